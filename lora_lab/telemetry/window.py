"""Find the measured part of a trial in its events."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.events import Event, Step, WindowClosed, WindowOpened

SLOW_START = 2.0
"""Leading steps slower than this multiple of the median count as warm-up."""


@dataclass(frozen=True, slots=True)
class Window:
    """Steps between two moments at which the device was idle."""

    start: float
    """time.monotonic() seconds."""
    end: float
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """Return the length of the window."""
        return self.end - self.start

    def part(self, first: int, count: int) -> "Window":
        """Return `count` of its steps from index `first` on. Its edges are where the device ended a step, by the
        steps' own times since the opening; no synchronisation was needed there.

        Raises: ValueError when a step has no time."""
        before, inside = self.steps[:first], self.steps[first : first + count]
        start = self.start + _seconds(before)
        whole = first + count >= len(self.steps)
        return Window(start, self.end if whole else start + _seconds(inside), inside)


def find_window(events: Sequence[Event], name: str = "train") -> Window | None:
    """Return the window of this name, or None when it never opened, never closed, or a step's loss never arrived:
    figures of half a window are not kept, nor those of a whole one with a part of its steps."""
    opened = next((event for event in events if isinstance(event, WindowOpened) and event.name == name), None)
    closed = next((event for event in events if isinstance(event, WindowClosed) and event.name == name), None)
    if opened is None or closed is None or closed.t <= opened.t:
        return None
    steps = (event for event in events if isinstance(event, Step))
    inside = tuple(step for step in steps if opened.after_step < step.step <= closed.after_step)
    whole = inside and len(inside) == closed.after_step - opened.after_step
    return Window(opened.t, closed.t, inside) if whole else None


def steady(window: Window) -> Window:
    """Return the window without its slow first steps: a compilation, or a warm-up that was too short. A slow step
    later on is part of what is measured."""
    times = [step.seconds for step in window.steps]
    if None in times or len(times) < 4:
        return window
    limit = SLOW_START * statistics.median([seconds for seconds in times if seconds is not None])
    slow = next((i for i, seconds in enumerate(times) if seconds is not None and seconds <= limit), 0)
    return window.part(slow, len(times) - slow) if slow else window


def _seconds(steps: Sequence[Step]) -> float:
    times = [step.seconds for step in steps]
    if None in times:
        raise ValueError("a step has no time")
    return sum(seconds for seconds in times if seconds is not None)
