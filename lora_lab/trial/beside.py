"""What a trial is given when other trials of its sweep run next to it."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from lora_lab.placement import Placement
from lora_lab.trial.display import Bars


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Where a trial runs next to others, and how it shows its progress and learns who they were."""

    slot: str
    """The name of its card, or of its cores."""
    placement: Placement
    bars: Bars
    """The bars of all trials that run now."""
    others: Callable[[], list[str]]
    """Returns the trials that have run on other slots since this one began, with their slots."""

    @property
    def console(self) -> Console | None:
        """Return the bars' console where standard output is the same terminal: a line printed past it would be drawn
        into them. None elsewhere."""
        return self.bars.console if sys.stdout.isatty() and self.bars.console.is_terminal else None


@dataclass(slots=True)
class _Stay:
    trial: str
    slot: str
    begun: float
    ended: float | None = None


class Stays:
    """Which trial was on which slot, and when."""

    def __init__(self) -> None:
        self._stays: list[_Stay] = []
        self._lock = threading.Lock()

    def begin(self, trial: str, slot: str) -> None:
        """Note that a trial begins."""
        with self._lock:
            self._stays.append(_Stay(trial, slot, time.monotonic()))

    def end(self, trial: str) -> None:
        """Note that a trial has left its slot."""
        with self._lock:
            self._of(trial).ended = time.monotonic()

    def now(self) -> dict[str, str]:
        """Return the trials that run now, by slot."""
        with self._lock:
            return {stay.slot: stay.trial for stay in self._stays if stay.ended is None}

    def others(self, trial: str) -> list[str]:
        """Return the trials that have run on other slots since `trial` began, in the order of their beginning."""
        with self._lock:
            own = self._of(trial)
            met = [
                stay for stay in self._stays if stay.slot != own.slot and (stay.ended is None or stay.ended > own.begun)
            ]
            return [f"{stay.trial} on {stay.slot}" for stay in met]

    def _of(self, trial: str) -> _Stay:
        return next(stay for stay in reversed(self._stays) if stay.trial == trial)
