"""Runs read from the folders of trials and sweeps: all that are over, whatever store they were delivered to.

A folder holds its whole record, so no store is asked. Importing MLflow takes 2 s, and its reading of 1,000 runs 7 s."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lab.config import InvalidInput, TrackingConfig
from lora_lab.files import read_json
from lora_lab.options import TrackingKind
from lora_lab.paths import MULTIRUN
from lora_lab.quality.answer_rows import ANSWERS, AnswerRow, read_answers
from lora_lab.reading import Damaged
from lora_lab.secrets import without_secrets
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.local_store import address_of, database_of, has_content, local_address
from lora_lab.store.record import Record
from lora_lab.store.recovery import Recovered, known_folders
from lora_lab.store.run_checks import printable
from lora_lab.store.runs import Readings, Run
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.store.trial_folder import DELIVERED, TrialFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folder:
    """A trial or a sweep, and its folder."""

    path: Path
    record: Record
    """The record of a trial is read without its series."""
    note: dict[str, object]
    """What delivered.json says; empty where no store has the record."""

    @property
    def run_id(self) -> str:
        """Return the store's id of the run, or the record's id if there is none."""
        return str(self.note.get("run_id") or self.record.id)

    @property
    def delivered_to(self) -> str | None:
        """Return the address that delivered.json names."""
        store = self.note.get("store")
        return str(store.get("address")) if isinstance(store, dict) and store.get("address") else None


class FolderRuns:
    """The trials and sweeps whose folders are known here."""

    def __init__(self, experiment: str | None) -> None:
        """Read the folders. A folder that cannot be read is left out and named on stderr.

        Args:
            experiment: read only trials meant for this MLflow experiment; None for all.
        """
        found = Recovered()
        self._folders: dict[str, _Folder] = {}
        """By the record's id, because a copied folder is the same trial."""
        for path in sorted(known_folders(found)):
            with found.setting_aside(path):
                for folder in _read(path, found):
                    self._folders.setdefault(folder.record.id, folder)
        for damaged in found.damaged:
            print(printable(f"left out, cannot be read: {damaged}"), file=sys.stderr)
        self._by_run = {folder.run_id: folder for folder in self._folders.values()}
        self._experiment = experiment
        within = f" (experiment {experiment})" if experiment else ""
        self.place = f"{MULTIRUN.absolute()}{within}"

    @property
    def trials(self) -> int:
        """Return how many trials were read."""
        return sum(not folder.record.is_sweep for folder in self._folders.values())

    def note(self) -> str:
        """Return a line that says that folders were read, not a store, and how to read a store."""
        stores = {folder.delivered_to for folder in self._folders.values() if folder.delivered_to}
        with contextlib.suppress(InvalidInput):
            stores.add(local_address())
        line = f"Trials read from their folders, as they were recorded: {self.trials}."
        if not stores:
            return line
        how = " or ".join(f"--store {without_secrets(address)}" for address in sorted(stores))
        return f"{line} To see later changes made in MLflow, and runs whose folders are not here, add {how}"

    def runs(self) -> Iterable[Run]:
        """Return every trial and sweep."""
        chosen = list(self._folders.values())
        if self._experiment is not None:
            names = {folder.run_id: _tracking(folder).experiment for folder in chosen}
            chosen = [folder for folder in chosen if names[folder.run_id] == self._experiment]
            if not chosen:
                there = printable(", ".join(sorted({*names.values()} - {""})))
                raise InvalidInput(f"{self.place}: there is no such experiment. The experiments are: {there}.")
        return [self._run(folder) for folder in chosen]

    def trial_folder(self, name: str) -> Path | None:
        """Return the folder of the trial whose run id or record id is `name`, or begins with it; None if no trial's
        does.

        Raises: InvalidInput when several trials' ids begin with it."""
        trials = [folder for folder in self._folders.values() if not folder.record.is_sweep]
        exact = [each for each in trials if name in (each.run_id, each.record.id)]
        begun = [each for each in trials if each.run_id.startswith(name) or each.record.id.startswith(name)]
        found = exact or begun
        if name and len(found) > 1:
            lines = [f"{name} is the beginning of {len(found)} ids. Give more characters of it:"]
            raise InvalidInput("\n  ".join(lines + [f"{each.run_id}  {each.path}" for each in found[:5]]))
        return found[0].path if name and found else None

    def series(self, run_id: str, keys: Sequence[str]) -> dict[str, Readings]:
        """Read these series of a trial. Those that it does not have are left out."""
        folder = self._by_run[run_id]
        try:
            record = TrialFolder(folder.path).record()
        except Damaged as damaged:
            print(printable(f"the series are left out: {damaged}"), file=sys.stderr)
            return {}
        found: dict[str, Readings] = {}
        for point in record.series if record is not None else ():
            if point.key in keys:
                found.setdefault(point.key, []).append((point.t_ms, point.step, point.value))
        return found

    def answers(self, run_id: str) -> list[AnswerRow]:
        """Read a trial's answers; none where there are none. A damaged line ends them, and is named on stderr."""
        found, damaged = read_answers(self._by_run[run_id].path / ANSWERS)
        if damaged is not None:
            print(printable(f"answers are left out: {damaged}"), file=sys.stderr)
        return found

    def store_of(self, run_id: str) -> str:
        """Return the address of the store that a trial or a sweep was delivered to."""
        folder = self._by_run[run_id]
        tracking = _tracking(folder)
        if tracking.kind is TrackingKind.none:
            raise TrackingFailed("the trial was not recorded in a store (tracking=none)")
        if not folder.note:
            raise TrackingFailed("its record is not in the store yet; the next start delivers it")
        if folder.delivered_to:
            return _present(folder.delivered_to)
        if tracking.kind is TrackingKind.server:
            return str(tracking.uri)
        return address_of(Path(tracking.root).resolve() / "mlflow.db")

    def _run(self, folder: _Folder) -> Run:
        record = folder.record
        above = None if record.parent is None else self._folders.get(record.parent)
        return Run(
            run_id=folder.run_id,
            above=record.parent if above is None else above.run_id,
            name=record.name,
            started_ms=record.started_ms,
            params=record.params,
            metrics=record.metrics,
            # where the folder is now: it may have been moved
            tags=record.tags | {"record_id": record.id, "folder": str(folder.path)},
        )


def _present(address: str) -> str:
    """Return the address of a store. A local one that is gone may have moved here with the folder around it."""
    database = database_of(address)
    if database is not None and not has_content(database):
        with contextlib.suppress(InvalidInput):
            return local_address()
    return address


def _read(path: Path, found: Recovered) -> Iterator[_Folder]:
    """Yield what a folder holds: a sweep with its trials, or one trial."""
    if SweepFolder(path).exists:
        with found.setting_aside(path):
            yield _folder(path, SweepFolder(path).read().record)
    for trial in map(TrialFolder, (path, *sorted(path.glob("[0-9]*")))):
        with found.setting_aside(trial.path):
            record = trial.record(series=False)
            if record is not None:
                yield _folder(trial.path, record)


def _folder(path: Path, record: Record) -> _Folder:
    note = read_json(path / DELIVERED) if (path / DELIVERED).is_file() else None
    return _Folder(path=path.resolve(), record=record, note=note if isinstance(note, dict) else {})


def _tracking(folder: _Folder) -> TrackingConfig:
    """Return the store that a trial or a sweep was meant for. An older folder does not say; then it is the default
    store."""
    try:
        if folder.record.is_sweep:
            return SweepFolder(folder.path).read().tracking
        asked = TrialFolder(folder.path).manifest()
    except Damaged:
        asked = None
    return TrackingConfig() if asked is None else asked.tracking
