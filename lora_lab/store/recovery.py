"""Recover what earlier starts left: record trials that were cut off, and deliver records that no store has."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from lora_lab.config import TrackingConfig
from lora_lab.options import TrackingKind
from lora_lab.outcome import Outcome
from lora_lab.paths import MULTIRUN
from lora_lab.reading import Damaged, text_of
from lora_lab.store import heartbeat
from lora_lab.store.claim import claim
from lora_lab.store.finishing import finish_for_dead
from lora_lab.store.multirun import folders
from lora_lab.store.outbox import Outbox
from lora_lab.store.record import ORPHAN
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.store.trial_folder import SENSELESS, Manifest, TrialFolder

_OUTSIDE = "outside.txt"
"""A file in multirun/ with a line for each folder that was put somewhere else."""


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
    """What could not be read. It is left as it is."""

    def count(self, run_id: str | None, store: Outbox) -> None:
        """Count a record as delivered or as waiting."""
        if run_id is None:
            self.waiting += 1
            self.faults.add(store.fault)
        else:
            self.delivered += 1

    @contextlib.contextmanager
    def setting_aside(self, path: Path) -> Iterator[None]:
        """Note a fault of what is in `path` and go on with everything else."""
        try:
            yield
        except Damaged as damaged:
            self.damaged[str(damaged)] = None
        except (OSError, *SENSELESS) as error:
            self.damaged[f"{path}: {type(error).__name__}: {error}"] = None

    def lines(self) -> list[str]:
        """Return what the user should know about it, in lines."""
        said = [f"set aside, cannot be read: {damaged}" for damaged in self.damaged]
        if self.damaged:
            said.append("repair or move away what is set aside; until then each start names it")
        if self.killed:
            said.append(f"left over from killed processes, now recorded as killed: {self.killed}")
        if self.delivered:
            said.append(f"records of earlier starts delivered to the store: {self.delivered}")
        if self.waiting:
            why = "; ".join(sorted(self.faults))
            said.append(f"records of earlier starts that still wait for their store: {self.waiting} ({why})")
        return said


def remember_outside(folder: Path) -> None:
    """Note a trial's or a sweep's folder that is outside multirun/, so that later starts find it."""
    with contextlib.suppress(ValueError):
        if len(folder.absolute().relative_to(MULTIRUN.absolute()).parts) == 2:
            return
    with contextlib.suppress(OSError):
        MULTIRUN.mkdir(exist_ok=True)
        with (MULTIRUN / _OUTSIDE).open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{folder.absolute()}\n")


def recover(store: Outbox) -> Recovered:
    """Recover what killed processes and unreachable stores left.

    Make the records of trials that were cut off. Deliver every record that no store has. End the runs that `store`
    lists as running although they are not."""
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
        return found  # another start is doing this now
    except OSError as error:
        found.damaged[f"{error.filename or MULTIRUN}: {error.strerror}; nothing in {MULTIRUN} is recovered"] = None
    return found


def _recover(found: Recovered, store: Outbox) -> None:
    stores = {repr(store.tracking): store}

    def store_of(tracking: TrackingConfig) -> Outbox:
        return stores.setdefault(repr(tracking), Outbox(tracking))

    left = known_folders(found)
    for path in left:  # sweeps first: the trials are nested under them
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
    """Return the folders of trials and sweeps that are known here: those below multirun/, and those in outside.txt."""
    outside: dict[Path, None] = {}
    with found.setting_aside(MULTIRUN / _OUTSIDE):
        for number, line in enumerate((text_of(MULTIRUN / _OUTSIDE) or "").split("\n"), 1):
            if line.isprintable() or _is_folder(line):
                outside |= {Path(line): None} if line else {}
            else:  # a line for a folder that was removed since is in order
                what = f"line {number} is not the name of a folder: {line[:200]!r}"
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
    if not heartbeat.gone(plan.owner, folder.path):
        return
    found.killed += folder.end_for_dead()
    if plan.tracking.kind is TrackingKind.none or folder.delivered_as_it_is:
        return
    store = store_of(plan.tracking)
    found.count(None if store.out_of_reach else store.deliver_sweep(folder), store)


def _recover_trial(folder: TrialFolder, store_of: Callable[[TrackingConfig], Outbox], found: Recovered) -> None:
    asked = folder.manifest()
    if asked is None or not heartbeat.gone(asked.owner, folder.path):
        return
    with claim(folder.path) as is_ours:
        if is_ours and folder.manifest() == asked:  # otherwise another process resumes the job
            _record_and_deliver(folder, asked, store_of, found)


def _record_and_deliver(
    folder: TrialFolder, asked: Manifest, store_of: Callable[[TrackingConfig], Outbox], found: Recovered
) -> None:
    with found.setting_aside(folder.path):  # the record is delivered once more, which changes nothing
        folder.check_delivery_note()
    record = folder.record()
    if record is None:
        record = finish_for_dead(folder, asked)
        if not asked.owner.is_here:  # it may be alive after all: its own record then takes this one's place
            record.tags[ORPHAN] = "another host's process, whose heartbeat had stopped"
        found.killed += record.outcome == Outcome.killed.value
    if asked.tracking.kind is TrackingKind.none:
        folder.mark_delivered("")
        return
    store = store_of(asked.tracking)
    found.count(None if store.out_of_reach else store.deliver_trial(folder, record), store)
