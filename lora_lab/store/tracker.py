"""The tracker protocol, which says how results are kept, and a tracker in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lora_lab.store.record import RUNNING, Point, Record

ATTEMPT = "attempt"
"""The tag that counts the attempts at a trial, from 1; a job that was resumed has 2. A record of a later attempt
replaces what the store has, although the trial was over there."""


def attempt_in(tags: Mapping[str, str]) -> int:
    """Return the number of the attempt that a record or a run is of."""
    text = tags.get(ATTEMPT, "")
    return int(text) if text.isdecimal() else 1


@dataclass(frozen=True, slots=True)
class Which:
    """A store, distinguished from another one that was at the same address before."""

    address: str
    made_ms: int | None
    """Unix time; None where the store does not know."""


class Tracker(Protocol):
    """A keeper of the record of each trial and of each sweep."""

    def deliver(self, record: Record, files: Sequence[Path]) -> str:
        """Record everything, or go on with a run that has part of it.

        Delivering twice is the same as delivering once. A trial that is over in the store stays as it is, unless the
        record is of a later attempt; see `add_tags`.

        Args:
            files: files and folders to keep with the run.

        Returns: the store's id of the run.

        Raises: SweepUnknown when the sweep above a trial must be delivered first; TrackingFailed.
        """

    def extend(self, run_id: str, points: Sequence[Point]) -> None:
        """Add points to the series of a run. Adding a point twice is the same as adding it once.

        Raises: TrackingFailed."""

    def add_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Add tags to a run that is over. Adding them twice is the same as adding them once.

        Raises: TrackingFailed."""

    def register(self, run_id: str, folder: Path, record: Record, name: str) -> None:
        """Make the adapter in a trial's folder a version of the registered model `name`. Doing it twice is the same as
        doing it once.

        Raises: TrackingFailed."""

    def end_orphans(self, gone: Callable[[dict[str, str]], bool]) -> int:
        """Mark runs as killed that the store lists as running though their process is gone.

        `gone` decides that from a run's tags. Return how many there were.

        Raises: TrackingFailed.
        """

    def which(self) -> Which:
        """Return which store this is.

        Raises: TrackingFailed."""

    def where(self, run_id: str) -> list[str]:
        """Return lines that say where the run is and how to look at it."""


class InMemoryTracker:
    """A tracker that keeps records in a dictionary.

    It is for tests, and for tracking=none, where the trial's folder is the record."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.registered: dict[str, str] = {}

    def deliver(self, record: Record, files: Sequence[Path]) -> str:
        """Remember the record."""
        there = self.records.get(record.id)
        later = there is not None and attempt_in(record.tags) > attempt_in(there.tags)
        if there is None or there.outcome == RUNNING or record.is_sweep or later:
            self.records[record.id] = replace(record, series=list(record.series))
        return record.id

    def extend(self, run_id: str, points: Sequence[Point]) -> None:
        """Remember the points."""
        series = self.records[run_id].series
        series += [point for point in points if point not in series]

    def add_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Remember the tags, where the run was delivered by this process."""
        if run_id in self.records:
            self.records[run_id].tags |= tags

    def register(self, run_id: str, folder: Path, record: Record, name: str) -> None:
        """Remember the name."""
        self.registered[run_id] = name

    def end_orphans(self, gone: Callable[[dict[str, str]], bool]) -> int:
        """Return 0: nothing here outlives its process."""
        return 0

    def which(self) -> Which:
        """Return a store that equals no other one: this store ends with its process."""
        return Which("", None)

    def where(self, run_id: str) -> list[str]:
        """Return a line that says that the record is not in a store."""
        return ["not recorded in a store (tracking=none)"]
