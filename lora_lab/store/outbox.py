"""Records on their way from a trial's folder to the store: at once, or by a later start when that was not possible."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from lora_lab.config import InvalidInput, TrackingConfig, TrackingKind
from lora_lab.outcome import Outcome
from lora_lab.reading import Damaged, text_of
from lora_lab.store.errors import SweepUnknown, TrackingFailed
from lora_lab.store.mlflow_store import open_tracker
from lora_lab.store.multirun import MULTIRUN, folders
from lora_lab.store.process_id import Owner
from lora_lab.store.record import Record
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.store.tracker import Tracker, Which
from lora_lab.store.trial_folder import SENSELESS, TrialFolder

_OUTSIDE = "outside.txt"
"""In it: a line for each folder that was put somewhere else."""


def owner_tags(owner: Owner, folder: Path) -> dict[str, str]:
    """What tells from a run alone whether its process still lives, and where its files are."""
    return {
        "process.host": owner.host,
        "process.boot_id": owner.boot_id,
        "process.pid": str(owner.pid),
        "process.started": str(owner.started),
        "folder": str(folder),
    }


def _owner_in(tags: dict[str, str]) -> Owner | None:
    try:
        return Owner(
            host=tags["process.host"],
            boot_id=tags["process.boot_id"],
            pid=int(tags["process.pid"]),
            started=int(tags["process.started"]),
        )
    except (KeyError, ValueError):
        return None


def absolute(tracking: TrackingConfig) -> TrackingConfig:
    """The same store from wherever a later start stands."""
    return replace(tracking, root=os.path.realpath(tracking.root))


class Outbox:
    """The store of one trial or sweep; a fault of it is kept in words and never raised into a trial."""

    def __init__(self, tracking: TrackingConfig) -> None:
        self.tracking = tracking
        self._tracker: Tracker | None = None
        self.fault = ""
        """Why the last thing could not be done."""
        self._needs_remedy = False
        """Whether somebody has to do something before it can be."""
        self.out_of_reach = False
        """Whether it could not even be opened."""

    def open(self) -> Tracker | None:
        """The tracker; None with `fault` when it can't be had now."""
        if self._tracker is None:
            try:
                self._tracker = open_tracker(self.tracking)
                self.fault = ""
            except (TrackingFailed, InvalidInput) as fault:
                self._failed(fault)
        self.out_of_reach = self._tracker is None
        return self._tracker

    def deliver_trial(self, folder: TrialFolder, record: Record) -> str | None:
        """Hand a trial's record over, its sweep's before if need be; returns the run's id, None with `fault`."""
        try:
            run_id = self._deliver(record, folder.artifacts())
        except SweepUnknown:
            sweep = SweepFolder(folder.path.parent)
            if self.deliver_sweep(sweep) is None:
                return None
            run_id = self._deliver(record, folder.artifacts())
        if run_id is not None:
            folder.mark_delivered(run_id, self._which())
        return run_id

    def deliver_sweep(self, folder: SweepFolder) -> str | None:
        """Hand over the record above a sweep's trials as it is now; returns the run's id, None with `fault`."""
        try:
            record = folder.read().record
        except Damaged as damaged:
            self.fault, self._needs_remedy = str(damaged), True
            return None
        run_id = self._deliver(record, folder.artifacts())
        if run_id is not None:
            folder.mark_delivered(run_id, record)
        return run_id

    def deliver_all(self, folder: SweepFolder) -> str | None:
        """Hand over a sweep that is over: its trials that the store has not taken yet, then the record above them.
        Returns that record's id in the store, None with `fault`; a trial's that was not taken is a `fault` too."""
        left = ""
        for path in sorted(folder.path.glob("[0-9]*")):
            trial = TrialFolder(path)
            try:
                record = None if self.has(trial) else trial.record()
            except Damaged:  # the next start names it
                continue
            if record is not None and self.deliver_trial(trial, record) is None:
                if self.out_of_reach:
                    return None
                left = self.fault
        run_id = self.deliver_sweep(folder)
        self.fault = self.fault or left
        return run_id

    def where(self, run_id: str) -> list[str]:
        """Lines that tell a person where the run is."""
        try:
            return [] if self._tracker is None else self._tracker.where(run_id)
        except TrackingFailed:
            return []

    def end_orphans(self) -> int:
        """Runs in the store whose process is gone, and whose folder is not here to tell more."""

        def gone(tags: dict[str, str]) -> bool:
            owner = _owner_in(tags)
            return owner is not None and owner.gone

        tracker = self.open()
        try:
            return 0 if tracker is None else tracker.end_orphans(gone)
        except TrackingFailed as fault:
            self._failed(fault)
            return 0

    def has(self, trial: TrialFolder) -> bool:
        """Whether a trial's record was delivered: here, and not to a store that stood here before and is gone."""
        was = trial.delivered_to
        now = None if was is None else self._which()
        return trial.delivered and (was is None or now is None or was.address != now.address or was == now)

    def outlook(self, what: str) -> str:
        """The fault, and when `what` will be in the store after all."""
        if self._needs_remedy:
            return f"{self.fault} What is recorded stays on disk; the first start after that delivers {what}"
        return f"{self.fault}; the next start delivers {what}"

    def _which(self) -> Which | None:
        """Which store this is; None where that can't be said."""
        tracker = None if self.out_of_reach else self.open()
        try:
            found = None if tracker is None else tracker.which()
        except TrackingFailed:
            return None
        return None if found is None or found.made_ms is None else found

    def _failed(self, fault: TrackingFailed | InvalidInput) -> None:
        self.fault = str(fault)
        self._needs_remedy = isinstance(fault, InvalidInput) or fault.needs_remedy

    def _deliver(self, record: Record, files: list[Path]) -> str | None:
        """Raises: SweepUnknown."""
        tracker = self.open()
        if tracker is None:
            return None
        try:
            run_id = tracker.deliver(record, files)
            self.fault = ""
            return run_id
        except SweepUnknown:
            raise
        except TrackingFailed as fault:
            self._failed(fault)
            self._tracker = None  # to be opened anew: a server may be back, a database unlocked
            return None


@dataclass(slots=True)
class Recovered:
    """What a start found left over from earlier ones."""

    killed: int = 0
    """Trials and sweeps whose process was gone before they were over."""
    delivered: int = 0
    waiting: int = 0
    """Records that no store has taken yet."""
    faults: set[str] = field(default_factory=set)
    damaged: dict[str, None] = field(default_factory=dict)
    """What could not be read, and is left as it is."""

    def count(self, run_id: str | None, store: Outbox) -> None:
        """Take in whether the store took a record."""
        if run_id is None:
            self.waiting += 1
            self.faults.add(store.fault)
        else:
            self.delivered += 1

    @contextlib.contextmanager
    def setting_aside(self, path: Path) -> Iterator[None]:
        """Go on after this with everything else, whatever is wrong with what is in `path`."""
        try:
            yield
        except Damaged as damaged:
            self.damaged[str(damaged)] = None
        except (OSError, *SENSELESS) as error:
            self.damaged[f"{path}: {type(error).__name__}: {error}"] = None

    def lines(self) -> list[str]:
        """What a person should know of it."""
        said = [f"set aside, cannot be read: {damaged}" for damaged in self.damaged]
        if self.damaged:
            said.append("put right, or move away, what is set aside; until then each start names it")
        if self.killed:
            said.append(f"left over from killed processes, now recorded as killed: {self.killed}")
        if self.delivered:
            said.append(f"records of earlier starts delivered to the store: {self.delivered}")
        if self.waiting:
            why = "; ".join(sorted(self.faults))
            said.append(f"records of earlier starts that still wait for their store: {self.waiting} ({why})")
        return said


def remember_outside(folder: Path) -> None:
    """Let later starts find a trial's or a sweep's folder that is not where they look."""
    with contextlib.suppress(ValueError):
        if len(folder.absolute().relative_to(MULTIRUN.absolute()).parts) == 2:
            return
    with contextlib.suppress(OSError):
        MULTIRUN.mkdir(exist_ok=True)
        with (MULTIRUN / _OUTSIDE).open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{folder.absolute()}\n")


def recover(store: Outbox) -> Recovered:
    """Bring in order what killed processes and stores that were out of reach have left: make the records of trials
    that were cut off, deliver every record that no store has, and end what `store` says is running and is not."""
    found = Recovered()
    if not MULTIRUN.is_dir():
        found.killed += store.end_orphans()
        return found
    try:
        with FileLock(MULTIRUN / ".recovery.lock", timeout=0):
            _recover(found, store)
            if not store.out_of_reach:
                found.killed += store.end_orphans()
    except Timeout:
        return found  # another start is at it
    except OSError as error:
        found.damaged[f"{error.filename or MULTIRUN}: {error.strerror}; nothing in {MULTIRUN} is looked after"] = None
    return found


def _recover(found: Recovered, store: Outbox) -> None:
    stores = {repr(store.tracking): store}

    def store_of(tracking: TrackingConfig) -> Outbox:
        return stores.setdefault(repr(tracking), Outbox(tracking))

    left = known_folders(found)
    for path in left:  # first, so that the trials have something to be nested under
        with found.setting_aside(path):
            if SweepFolder(path).exists:
                _recover_sweep(SweepFolder(path), store_of, found)
    for path in left:
        trials = [path]
        with found.setting_aside(path):
            trials += path.glob("[0-9]*")
        for trial in map(TrialFolder, trials):
            with found.setting_aside(trial.path):
                if not store.has(trial):
                    _recover_trial(trial, store_of, found)


def known_folders(found: Recovered) -> list[Path]:
    """List the folders of trials and sweeps that are known here: those below multirun/, and those in outside.txt."""
    outside: dict[Path, None] = {}
    with found.setting_aside(MULTIRUN / _OUTSIDE):
        for number, line in enumerate((text_of(MULTIRUN / _OUTSIDE) or "").split("\n"), 1):
            if line.isprintable() or _is_folder(line):
                outside |= {Path(line): None} if line else {}
            else:  # one that names a folder that was taken away since is as it should be
                what = f"line {number} is the name of no folder: {line[:200]!r}"
                found.damaged[f"{MULTIRUN / _OUTSIDE}: {what}"] = None
    return [*folders(), *outside]


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:
        return False


def _recover_sweep(folder: SweepFolder, store_of: Callable[[TrackingConfig], Outbox], found: Recovered) -> None:
    with found.setting_aside(folder.path):  # the record is delivered once more
        folder.check_delivery_note()
    plan = folder.read()
    if not plan.owner.gone:
        return
    found.killed += folder.end_for_dead()
    if plan.tracking.kind is TrackingKind.none or folder.delivered_as_it_is:
        return
    store = store_of(plan.tracking)
    found.count(None if store.out_of_reach else store.deliver_sweep(folder), store)


def _recover_trial(folder: TrialFolder, store_of: Callable[[TrackingConfig], Outbox], found: Recovered) -> None:
    asked = folder.manifest()
    if asked is None or not asked.owner.gone:
        return
    with found.setting_aside(folder.path):  # the record is delivered once more, which changes nothing
        folder.check_delivery_note()
    record = folder.record()
    if record is None:
        record = folder.finish_for_dead(asked)
        found.killed += record.outcome == Outcome.killed.value
    if asked.tracking.kind is TrackingKind.none:
        folder.mark_delivered("")
        return
    store = store_of(asked.tracking)
    found.count(None if store.out_of_reach else store.deliver_trial(folder, record), store)
