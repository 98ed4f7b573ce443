"""The outbox: records on their way from a trial's folder to the store.

A record is delivered at once, or by a later start if that was not possible."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_lab.base_weights import trained_in
from lora_lab.config import InvalidInput, TrackingConfig
from lora_lab.outcome import Outcome
from lora_lab.reading import Damaged
from lora_lab.store import heartbeat
from lora_lab.store.errors import SweepUnknown, TrackingFailed
from lora_lab.store.live_run import ENDING_SECONDS, LiveRun
from lora_lab.store.mlflow_store import open_tracker
from lora_lab.store.process_id import Owner
from lora_lab.store.record import Record
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.store.tracker import Tracker, Which
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.sampler import Sample


def owner_tags(owner: Owner, folder: Path) -> dict[str, str]:
    """Return tags that show whether a run's process is still alive, and where the run's files are."""
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
    """Return the same store with an absolute path, for later starts from other folders."""
    return replace(tracking, root=os.path.realpath(tracking.root))


class Outbox:
    """The store of one trial or sweep. A fault of the store is kept as text and never raised into a trial."""

    def __init__(self, tracking: TrackingConfig) -> None:
        self.tracking = tracking
        self._tracker: Tracker | None = None
        self.fault = ""
        """Why the last request failed."""
        self._needs_remedy = False
        """Whether the user has to do something before it can succeed."""
        self.out_of_reach = False
        """Whether the store could not even be opened."""
        self._live: LiveRun | None = None

    def follow(self, asked: Manifest, samples: Sequence[Sample], tell: Callable[[str], None]) -> LiveRun:
        """Return what shows a job in the store while it runs, see LiveRun. The next delivery ends it."""
        self._live = LiveRun(self.tracking, asked, samples, tell)
        return self._live

    def open(self) -> Tracker | None:
        """Return the tracker; None with `fault` when it cannot be opened now."""
        if self._tracker is None:
            try:
                self._tracker = open_tracker(self.tracking)
                self.fault = ""
            except (TrackingFailed, InvalidInput) as fault:
                self._failed(fault)
        self.out_of_reach = self._tracker is None
        return self._tracker

    def deliver_trial(self, folder: TrialFolder, record: Record) -> str | None:
        """Deliver a trial's record, and that of its sweep first if needed, and register what it trained if asked to.

        Return the run's id; None with `fault`, until all of that is done."""
        try:
            run_id = self._deliver(record, folder.artifacts())
        except SweepUnknown:
            sweep = SweepFolder(folder.path.parent)
            if self.deliver_sweep(sweep) is None:
                return None
            run_id = self._deliver(record, folder.artifacts())
        if run_id is None or not self._register(run_id, folder, record):
            return None
        folder.mark_delivered(run_id, self._which())
        return run_id

    def _register(self, run_id: str, folder: TrialFolder, record: Record) -> bool:
        """Register what a trial has trained where that is asked for. Return False with `fault`."""
        name = self.tracking.register
        tracker = None if name is None else self.open()
        if name is None or record.outcome != Outcome.finished.value or trained_in(folder.path) is None:
            return True
        try:
            if tracker is None:
                return False
            tracker.register(run_id, folder.path, record, name)
        except TrackingFailed as fault:
            self._failed(fault)
            self.fault = f"the run {run_id} is in the store, but it is no version of tracking.register={name}: {fault}"
            return False
        return True

    def add_tags(self, folder: TrialFolder, tags: Mapping[str, str]) -> None:
        """Add tags to the record of a trial that is over, on disk and in the store. Adding them twice is the same as
        adding them once. A store that cannot take them leaves `fault`."""
        try:
            run_id = folder.add_tags(tags)
        except (Damaged, OSError) as fault:
            self.fault = str(fault)
            return
        tracker = None if run_id is None else self.open()
        if run_id is None or tracker is None:
            return
        try:
            tracker.add_tags(run_id, tags)
        except TrackingFailed as fault:
            self._failed(fault)

    def deliver_sweep(self, folder: SweepFolder) -> str | None:
        """Deliver the record above a sweep's trials as it is now. Return the run's id; None with `fault`."""
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
        """Deliver a sweep that is over: its trials that the store does not have yet, then the record above them.

        Return that record's id in the store; None with `fault`. A trial that was not delivered sets `fault` too."""
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
        """Return lines that say where the run is."""
        try:
            return [] if self._tracker is None else self._tracker.where(run_id)
        except TrackingFailed:
            return []

    def end_orphans(self) -> int:
        """End the runs in the store whose process is gone and whose folder is not here to say more.

        Return how many there were."""

        def gone(tags: dict[str, str]) -> bool:
            owner = _owner_in(tags)
            folder = Path(tags.get("folder") or os.devnull)  # no file is inside os.devnull
            return owner is not None and heartbeat.gone(owner, folder)

        tracker = self.open()
        try:
            return 0 if tracker is None else tracker.end_orphans(gone)
        except TrackingFailed as fault:
            self._failed(fault)
            return 0

    def has(self, trial: TrialFolder) -> bool:
        """Return whether a trial's record was delivered to this store.

        A store that was at the same address before, and is gone, does not count."""
        was = trial.delivered_to
        now = None if was is None else self._which()
        return trial.delivered and (was is None or now is None or was.address != now.address or was == now)

    def outlook(self, what: str) -> str:
        """Return the fault, and when `what` will be in the store after all."""
        if self._needs_remedy:
            return f"{self.fault} The records stay on disk. The first start after that delivers {what}"
        return f"{self.fault}; the next start delivers {what}"

    def _which(self) -> Which | None:
        """Return which store this is; None when that is not known."""
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
        """Deliver a record. Return the run's id; None with `fault`.

        Raises: SweepUnknown."""
        if self._live is not None and not self._live.ended():
            self.fault, self._needs_remedy = f"the store has not answered for {ENDING_SECONDS:g} s", False
            return None
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
            self._tracker = None  # it is opened again next time: a server may be back, a database unlocked
            return None
