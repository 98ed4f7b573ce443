"""Recorded runs as the report asks for them: trials and sweeps by id, their series, and a page kept with them.

Runs are read from the trial folders that are known here (folder_runs.py), which needs neither MLflow nor a store. When
there are none, or a store is named, MLflow's client reads the store (mlflow_runs.py). Both give the same trials for the
same runs. A folder has its trial as it was recorded. Only the store knows what was deleted or edited in MLflow since. A
line says so, and how to read the store.
"""

import difflib
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path

from lora_lab.config import InvalidInput
from lora_lab.quality.answer_rows import AnswerRow
from lora_lab.store.errors import TrackingFailed, store_errors
from lora_lab.store.folder_runs import FolderRuns
from lora_lab.store.local_store import check_unlocked, database_of, local_address
from lora_lab.store.mlflow_client import connect, look
from lora_lab.store.mlflow_runs import MlflowRuns
from lora_lab.store.run_checks import is_reading
from lora_lab.store.runs import SERIES, Found, Readings, Source, trials_and_sweeps
from lora_lab.store.saved_view import run_page
from lora_lab.store.trials import Sweep, Trial

STORE_HELP = (
    "the address of an MLflow store to read (default: the trials' folders in multirun/ here, as they were recorded; "
    "where there are none, the store under mlruns/)"
)
"""The help text of --store, which says where the commands read from."""

_NEWEST = 5
_SHORT = 12
"""How many characters of an id are shown."""


class StoredRuns:
    """The trials and sweeps of one source, read once."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def runs(self) -> Found:
        """Return all trials and sweeps.

        Raises: InvalidInput when there is no trial; TrackingFailed."""
        trials, sweeps = self._trials_and_sweeps
        if not trials:
            raise InvalidInput(f"{self._source.place} holds no trial of lora_lab. Run one: python -m lora_lab")
        return list(trials), list(sweeps)

    def of(self, names: Sequence[str]) -> Found:
        """Return the trials of these sweeps, and these trials, with the sweeps that they belong to.

        Args:
            names: ids of runs in the store, record ids (tag record_id), or the beginnings of either.

        Raises: InvalidInput when a name fits no run or several, or a sweep has no trial; TrackingFailed.
        """
        trials, sweeps = self.runs()
        chosen = {self.id_of(name) for name in names}
        below = [trial for trial in trials if trial.run_id in chosen or trial.sweep in chosen]
        for sweep in sweeps:
            if sweep.run_id in chosen and all(trial.sweep != sweep.run_id for trial in below):
                raise InvalidInput(f"{_line(sweep)}: none of its trials is over.\n{self._newest()}")
        above = {trial.sweep for trial in below}
        return below, [sweep for sweep in sweeps if sweep.run_id in above]

    def last_sweep(self) -> Found:
        """Return the sweep whose newest trial began last. Without any sweep, return the newest trial.

        Raises: InvalidInput when there is no trial; TrackingFailed."""
        trials, sweeps = self.runs()
        known = {sweep.run_id for sweep in sweeps}
        newest = next((trial.sweep for trial in reversed(trials) if trial.sweep in known), None)
        return self.of([newest or trials[-1].run_id])

    def series(self, run_id: str, keys: Sequence[str] = SERIES) -> dict[str, Readings]:
        """Read series of a trial, by their key. Those that it does not have are left out.

        Raises: TrackingFailed."""
        read = self._source.series(run_id, keys)
        found = {key: [reading for reading in readings if is_reading(reading)] for key, readings in read.items()}
        return {key: sorted(found[key], key=lambda reading: reading[:2]) for key in keys if found.get(key)}

    def answers(self, trial: Trial) -> list[AnswerRow]:
        """Return a trial's answers to held-out prompts; none where it gave none.

        Raises: TrackingFailed."""
        return self._source.answers(trial.run_id) if "quality/answers" in trial.metrics else []

    def keep(self, run_id: str, file: Path) -> None:
        """Put a file among a run's artifacts in its store. A file of the same name is replaced.

        Raises: TrackingFailed."""
        uri = self._source.store_of(run_id)
        client, database = connect(uri), database_of(uri)
        with store_errors():
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "deleted":
                raise TrackingFailed(f"run {run_id} was deleted there")
            if run.info.artifact_uri.startswith("mlflow-artifacts:") and not uri.startswith("http"):
                raise TrackingFailed(
                    "its artifacts are on a tracking server. To keep the page there, give --store http://..."
                )
            if database is not None:
                check_unlocked(database)
            client.log_artifact(run_id, str(file))

    def where(self, run_id: str, file: str = "") -> list[str]:
        """Return lines that say how to open the UI at a run's artifacts, or at one of these.

        Raises: TrackingFailed."""
        uri = self._source.store_of(run_id)
        client = connect(uri)
        with store_errors():
            experiment = client.get_run(run_id).info.experiment_id
        return look(uri, run_page(experiment, run_id, "/".join(filter(None, ["artifacts", file]))))

    @cached_property
    def _trials_and_sweeps(self) -> Found:
        return trials_and_sweeps(self._source.runs())

    @property
    def _known(self) -> dict[str, Trial | Sweep]:
        trials, sweeps = self._trials_and_sweeps
        both: list[Trial | Sweep] = [*sweeps, *trials]
        return {run.run_id: run for run in both}

    def id_of(self, name: str) -> str:
        """Return the id of the run that a name means: its id in the store, its record's id, or the beginning of either.

        Raises: InvalidInput when the name fits no run or several; TrackingFailed."""
        known = self._known
        ids = {run_id: run.tags["record_id"] for run_id, run in known.items()}
        found = [run_id for run_id, record_id in ids.items() if name in (run_id, record_id)]
        found = found or [run_id for run_id in ids if name and run_id.startswith(name)]
        found = found or [run_id for run_id, record_id in ids.items() if name and record_id.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            lines = [f"{name} is the beginning of {len(found)} ids. Give more characters of it:"]
            raise InvalidInput("\n  ".join(lines + [_line(known[run_id]) for run_id in found[:_NEWEST]]))
        lines = [f"no run of lora_lab in {self._source.place} has an id that begins with {name!r}."]
        beginnings = {run_id[: len(name)]: run_id for run_id in known}
        near = difflib.get_close_matches(name, beginnings, n=2, cutoff=0.75) if name else []
        lines += [f"A similar id: {_line(known[beginnings[text]])}" for text in near]
        raise InvalidInput("\n".join([*lines, self._newest()]))

    def _newest(self) -> str:
        trials, sweeps = self._trials_and_sweeps
        counts = Counter(trial.sweep for trial in trials)
        lines = [f"{_line(sweep)}, {counts[sweep.run_id]} trials" for sweep in sweeps[: -_NEWEST - 1 : -1]]
        head = "The newest sweeps:"
        if not lines:
            head, lines = "There is no sweep; the newest trials:", [_line(t) for t in trials[: -_NEWEST - 1 : -1]]
        return "\n  ".join([head, *lines])


def open_store(uri: str | None, experiment: str | None = None) -> StoredRuns:
    """Open the runs of a store, or those in the folders here.

    Args:
        uri: MLflow tracking URI. None for the trial folders that are known in multirun/ here. If there are none, the
            local store under mlruns/ is opened.
        experiment: read only the runs of this experiment; None for all.

    Raises: InvalidInput when there is neither a trial folder nor a local store; TrackingFailed when the store cannot be
    read.
    """
    if uri is not None:
        return StoredRuns(MlflowRuns(uri, experiment))
    folders = FolderRuns(experiment)
    if folders.trials:
        print(folders.note(), file=sys.stderr)
        return StoredRuns(folders)
    try:
        local = local_address()
    except InvalidInput as missing:
        raise InvalidInput(f"there is no trial in {folders.place}, and {missing}") from None
    return StoredRuns(MlflowRuns(local, experiment))


def _line(run: Trial | Sweep) -> str:
    began = datetime.fromtimestamp(run.started_ms / 1e3).astimezone()
    return f"{run.run_id[:_SHORT]}  {run.name}, {began:%Y-%m-%d %H:%M}"
