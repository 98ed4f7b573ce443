"""Runs read back from a store, as the trials and sweeps that lora_lab.report looks at; and a report kept with them.

A local store's tables are read without MLflow: those of 1,000 runs take half a second, where MLflow's client needs 7 s
and 2 s more to be imported. Every other store goes through the client. Both give the same.
"""

import contextlib
import dataclasses
import difflib
import math
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lora_lab.config import InvalidInput
from lora_lab.secrets import without_secrets
from lora_lab.store.errors import TrackingFailed, store_errors
from lora_lab.store.local_store import LOCKED_SECONDS, check_unlocked, database_of, local_address
from lora_lab.store.mlflow_client import check_store_exists, connect, look
from lora_lab.store.mlflow_names import SERIES as NAMES
from lora_lab.store.mlflow_names import read_back
from lora_lab.store.older_runs import axes_of_today, params_of_today, tags_of_today
from lora_lab.store.record import RUNNING
from lora_lab.store.run_checks import fault_of, is_reading, printable
from lora_lab.store.saved_view import run_page
from lora_lab.store.trials import Sweep, Trial

SERIES = tuple(NAMES)
"""Metrics that have a value for each step or reading. A store shows the last one among a run's figures, where it
says nothing of the trial."""

KNOWN_SCHEMAS = ("dc11669786a5",)
"""Versions of MLflow's tables that are read here (MLflow 3.17); a store of another goes through the client."""

_PARENT = "mlflow.parentRunId"
_RUNS_A_CALL = 1000
_NEWEST = 5
_SHORT = 12
"""Characters of an id that people are shown."""

Found = tuple[list[Trial], list[Sweep]]
"""Both by their start."""

Readings = list[tuple[int, int, float]]
"""One series: Unix time in ms, step or number of the reading, value; by time."""


@dataclass(slots=True, kw_only=True)
class _Run:
    """A run of lora_lab as a store has it."""

    run_id: str
    name: str
    experiment: str
    """Its id."""
    started_ms: int
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class _Source(Protocol):
    """A way into a store. Runs that were deleted are not there."""

    def experiments(self) -> dict[str, str]:
        """Names by id."""

    def runs(self, experiments: Sequence[str]) -> Iterable[_Run]:
        """Every run of lora_lab's in these experiments (ids)."""

    def series(self, run_id: str, keys: Sequence[str]) -> dict[str, Readings]:
        """Those of a run's series that it has, in any order."""


class StoredRuns:
    """Trials and sweeps in a store, read once."""

    def __init__(self, uri: str, source: _Source, experiment: str | None) -> None:
        self._uri = uri
        self._source = source
        self._experiment = experiment

    def runs(self) -> Found:
        """All there is.

        Raises: InvalidInput when there is none; TrackingFailed."""
        trials, sweeps = self._trials_and_sweeps
        if not trials:
            raise InvalidInput(f"{self._place} holds no trial of lora_lab. Run one: python -m lora_lab")
        return list(trials), list(sweeps)

    def of(self, names: Sequence[str]) -> Found:
        """The trials of these sweeps, and these trials, with the sweeps that they belong to.

        Args:
            names: ids of runs in the store, or record ids (tag record_id), or the beginnings of such.

        Raises: InvalidInput when a name fits no run or several, or a sweep has no trial; TrackingFailed."""
        trials, sweeps = self.runs()
        chosen = {self.id_of(name) for name in names}
        below = [trial for trial in trials if trial.run_id in chosen or trial.sweep in chosen]
        for sweep in sweeps:
            if sweep.run_id in chosen and all(trial.sweep != sweep.run_id for trial in below):
                raise InvalidInput(f"{_line(sweep)}: the store has no trial of it that is over.\n{self._newest()}")
        above = {trial.sweep for trial in below}
        return below, [sweep for sweep in sweeps if sweep.run_id in above]

    def last_sweep(self) -> Found:
        """The sweep whose newest trial began last; without any sweep, the newest trial.

        Raises: InvalidInput when there is no trial; TrackingFailed."""
        trials, sweeps = self.runs()
        known = {sweep.run_id for sweep in sweeps}
        newest = next((trial.sweep for trial in reversed(trials) if trial.sweep in known), None)
        return self.of([newest or trials[-1].run_id])

    def series(self, run_id: str, keys: Sequence[str] = SERIES) -> dict[str, Readings]:
        """Series of a trial by their key; those that it has not are left out.

        Raises: TrackingFailed."""
        names = {NAMES.get(key, key): key for key in keys}
        found: dict[str, Readings] = {}
        for name, readings in self._source.series(run_id, [*names, *keys]).items():
            found.setdefault(names.get(name, name), []).extend(filter(is_reading, readings))
        return {key: sorted(found[key], key=lambda reading: reading[:2]) for key in keys if found.get(key)}

    def keep(self, run_id: str, file: Path) -> None:
        """Put a file among a run's artifacts; one of the same name is replaced.

        Raises: TrackingFailed."""
        client, database = connect(self._uri), database_of(self._uri)
        with store_errors():
            artifacts = client.get_run(run_id).info.artifact_uri
            if artifacts.startswith("mlflow-artifacts:") and not self._uri.startswith("http"):
                raise TrackingFailed(
                    "its files are with a tracking server; to keep the page there, give --store http://..."
                )
            if database is not None:
                check_unlocked(database)
            client.log_artifact(run_id, str(file))

    def where(self, run_id: str, file: str = "") -> list[str]:
        """Lines that tell how to open the UI at a run's artifacts, or at one of these.

        Raises: TrackingFailed."""
        experiment = self._by_id[run_id].experiment
        page = run_page(experiment, run_id, "/".join(filter(None, ["artifacts", file])))
        return look(self._uri, page)

    @property
    def _place(self) -> str:
        return f"the store {without_secrets(self._uri)}" + (
            f" (experiment {self._experiment})" if self._experiment else ""
        )

    @cached_property
    def _by_id(self) -> dict[str, _Run]:
        experiments = self._source.experiments()
        chosen = [key for key, name in experiments.items() if self._experiment in (None, name)]
        if not chosen:
            names = printable(", ".join(sorted(map(str, experiments.values()))))
            raise InvalidInput(f"{self._place}: there is no such experiment. There are: {names}.")
        read = []
        for run in self._source.runs(chosen):
            run.params, run.tags, run.metrics = read_back(run.params, run.tags, run.metrics)
            fault = fault_of(run.started_ms, run.params, run.metrics, run.tags)
            if fault:
                print(printable(f"run {run.run_id} is left out: {fault}"), file=sys.stderr)
            else:
                read.append(_shown(run))
        return {run.run_id: run for run in sorted(read, key=lambda run: (run.started_ms, run.run_id))}

    @cached_property
    def _trials_and_sweeps(self) -> Found:
        runs = self._by_id.values()
        # one that a kill left without its params is known by what lies under it
        above = {run.tags.get(_PARENT) for run in runs}
        sweeps = [run for run in runs if run.run_id in above or {"points", "trials"} <= run.params.keys()]
        ids = {run.run_id for run in sweeps}
        return [_trial(run) for run in runs if run.run_id not in ids], [_sweep(run) for run in sweeps]

    def id_of(self, name: str) -> str:
        """Return the id of the run that a name means: a run's id in the store, a record's id, or the beginning of one.

        Raises: InvalidInput when it fits no run or several; TrackingFailed."""
        ids = {run.run_id: run.tags["record_id"] for run in self._by_id.values()}
        found = [run_id for run_id, record_id in ids.items() if name in (run_id, record_id)]
        found = found or [run_id for run_id in ids if name and run_id.startswith(name)]
        found = found or [run_id for run_id, record_id in ids.items() if name and record_id.startswith(name)]
        if len(found) == 1:
            return found[0]
        trials, sweeps = self._trials_and_sweeps
        known: dict[str, Trial | Sweep] = {run.run_id: run for run in sweeps}
        known |= {run.run_id: run for run in trials}
        if found:
            lines = [f"{name} is the beginning of {len(found)} ids, give more of it:"]
            raise InvalidInput("\n  ".join(lines + [_line(known[run_id]) for run_id in found[:_NEWEST]]))
        lines = [f"no run of lora_lab in {self._place} has an id that begins with {name!r}."]
        beginnings = {run_id[: len(name)]: run_id for run_id in known}
        near = difflib.get_close_matches(name, beginnings, n=2, cutoff=0.75) if name else []
        lines += [f"Near it: {_line(known[beginnings[text]])}" for text in near]
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
    """The runs of a store that is there.

    Args:
        uri: MLflow tracking URI; None for the local store under mlruns/ here.
        experiment: only this one's runs; None for those of all.

    Raises: InvalidInput when there is no local store; TrackingFailed when the store can't be had."""
    if uri is None:
        uri = local_address()
    database = database_of(uri)
    if database is not None:
        check_store_exists(uri)
    if database is not None:
        tables = _Tables(database)
        if tables.schema in KNOWN_SCHEMAS:
            return StoredRuns(uri, tables, experiment)
    return StoredRuns(uri, _Client(uri), experiment)


def _trial(run: _Run) -> Trial:
    return Trial(
        run_id=run.run_id,
        name=run.name,
        sweep=run.tags.get(_PARENT),
        outcome=run.tags.get("outcome", RUNNING),
        params=params_of_today(run.params),
        metrics={key: value for key, value in run.metrics.items() if key not in SERIES},
        tags=tags_of_today(_own(run.tags)),
        started_ms=run.started_ms,
    )


def _sweep(run: _Run) -> Sweep:
    return Sweep(
        run_id=run.run_id,
        name=run.name,
        outcome=run.tags.get("outcome", RUNNING),
        params=axes_of_today(run.params),
        tags=tags_of_today(_own(run.tags)),
        started_ms=run.started_ms,
    )


def _shown(run: _Run) -> _Run:
    """A run whose texts can be shown."""
    params = {printable(key): printable(text) for key, text in run.params.items()}
    tags = {printable(key): printable(text) for key, text in run.tags.items()}
    return dataclasses.replace(run, name=printable(run.name), params=params, tags=tags)


def _own(tags: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if not key.startswith("mlflow.")}


def _line(run: Trial | Sweep) -> str:
    began = datetime.fromtimestamp(run.started_ms / 1e3).astimezone()
    return f"{run.run_id[:_SHORT]}  {run.name}, {began:%Y-%m-%d %H:%M}"


def _number(value: float) -> float:
    """A store that knows no infinity keeps the largest number instead. What is no number stays, to be left out."""
    if not isinstance(value, int | float):
        return value
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else value


class _Tables:
    """A local store's tables, read as they are."""

    def __init__(self, database: Path) -> None:
        self._database = database

    @property
    def schema(self) -> str:
        """Which version of MLflow's tables these are."""
        with _reading(self._database) as connection:
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return "" if found is None else str(found[0])

    def experiments(self) -> dict[str, str]:
        with _reading(self._database) as connection:
            rows = connection.execute("SELECT experiment_id, name FROM experiments WHERE lifecycle_stage = 'active'")
            return {str(key): name for key, name in rows}

    def runs(self, experiments: Sequence[str]) -> Iterable[_Run]:
        with _reading(self._database) as connection:
            heads = connection.execute(
                "SELECT run_uuid, name, experiment_id, start_time FROM runs JOIN tags USING (run_uuid) "
                "WHERE key = 'record_id' AND lifecycle_stage = 'active'"
            )
            found = {
                run_id: _Run(run_id=run_id, name=name or "", experiment=str(experiment), started_ms=started_ms)
                for run_id, name, experiment, started_ms in heads
                if str(experiment) in experiments
            }
            for run_id, key, text in connection.execute("SELECT run_uuid, key, value FROM params"):
                if run_id in found:
                    found[run_id].params[key] = text
            for run_id, key, text in connection.execute("SELECT run_uuid, key, value FROM tags"):
                if run_id in found:
                    found[run_id].tags[key] = text
            for run_id, key, value, is_nan in connection.execute(
                "SELECT run_uuid, key, value, is_nan FROM latest_metrics"
            ):
                if run_id in found:
                    found[run_id].metrics[key] = math.nan if is_nan else _number(value)
        return found.values()

    def series(self, run_id: str, keys: Sequence[str]) -> dict[str, Readings]:
        found: dict[str, Readings] = {}
        marks = ",".join("?" * len(keys))
        with _reading(self._database) as connection:
            for key, t_ms, step, value, is_nan in connection.execute(
                f"SELECT key, timestamp, step, value, is_nan FROM metrics WHERE run_uuid = ? AND key IN ({marks})",
                (run_id, *keys),
            ):
                found.setdefault(key, []).append((t_ms, step, math.nan if is_nan else _number(value)))
        return found


@contextlib.contextmanager
def _reading(database: Path) -> Iterator[sqlite3.Connection]:
    """One look at a database, in which nothing changes meanwhile and to which nothing is done.

    Raises: TrackingFailed."""
    try:
        with contextlib.closing(_opened(database)) as connection:
            # one text that is not UTF-8 would make the whole store unreadable
            connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            connection.execute("BEGIN")
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise TrackingFailed(f"the store {database} can't be read ({error})") from error


def _opened(database: Path) -> sqlite3.Connection:
    address = f"{database.resolve().as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True, timeout=LOCKED_SECONDS, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error as error:
        connection.close()
        unfinished = any(Path(f"{database}{end}").exists() for end in ("-wal", "-journal"))
        if error.sqlite_errorcode != sqlite3.SQLITE_CANTOPEN or unfinished:
            raise
        # one with a write-ahead log wants a file beside it, for which a folder that is only to be read has no place
        connection = sqlite3.connect(f"{address}&immutable=1", uri=True, isolation_level=None)
    return connection


class _Client:
    """Any store, by MLflow's client."""

    def __init__(self, uri: str) -> None:
        self._client = connect(uri)

    def experiments(self) -> dict[str, str]:
        with store_errors():
            return {str(one.experiment_id): one.name for one in _pages(self._client.search_experiments)}

    def runs(self, experiments: Sequence[str]) -> Iterable[_Run]:
        # oldest first: a run that comes meanwhile is put at the end, and moves none from one page to the next
        # MLflow can't even make an object of a run without a start, and would give none of the others
        ours = "tags.record_id != '' and attributes.start_time > 0"
        asked = {"filter_string": ours, "order_by": ["attributes.start_time ASC"]}
        with store_errors():
            return [_run(run) for run in _pages(self._client.search_runs, experiment_ids=list(experiments), **asked)]

    def series(self, run_id: str, keys: Sequence[str]) -> dict[str, Readings]:
        with store_errors():
            history = {key: self._client.get_metric_history(run_id, key) for key in keys}
        return {key: [(p.timestamp, p.step, _number(p.value)) for p in points] for key, points in history.items()}


def _pages(search: Any, **asked: Any) -> Iterator[Any]:
    page = search(max_results=_RUNS_A_CALL, **asked)
    yield from page
    while page.token:
        page = search(max_results=_RUNS_A_CALL, page_token=page.token, **asked)
        yield from page


def _run(run: Any) -> _Run:
    return _Run(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        experiment=str(run.info.experiment_id),
        started_ms=run.info.start_time,
        params=dict(run.data.params),
        metrics={key: _number(value) for key, value in run.data.metrics.items()},
        tags=dict(run.data.tags),
    )
