"""Find the measured part of a trial in its events."""

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.events import Event, PhaseBegan, Step, WindowClosed, WindowOpened
from lora_lab.job_events import Resumed
from lora_lab.phase import Phase
from lora_lab.telemetry.attempts import counting
from lora_lab.telemetry.sampler import Sample

SLOW_START = 2.0
"""Leading steps slower than this multiple of the median count as warm-up."""


@dataclass(frozen=True, slots=True)
class Window:
    """Steps between two moments at which the device was idle, or all such stretches of a job together."""

    start: float
    """time.monotonic() seconds."""
    end: float
    steps: tuple[Step, ...]
    parts: tuple["Window", ...] = ()
    """The stretches between evaluations and checkpoints; empty where there is one. What lies between them is not
    measured."""
    is_first: bool = True
    """Whether the worker has just begun, or gone back to a checkpoint."""

    @classmethod
    def joined(cls, stretches: Sequence["Window"]) -> "Window":
        """Return stretches as one window; the only one as it is."""
        if len(stretches) == 1:
            return stretches[0]
        steps = tuple(step for stretch in stretches for step in stretch.steps)
        return cls(stretches[0].start, stretches[-1].end, steps, tuple(stretches))

    @property
    def stretches(self) -> tuple["Window", ...]:
        """Return its stretches: itself, where there is one."""
        return self.parts or (self,)

    @property
    def seconds(self) -> float:
        """Return the length of the window, which is that of its stretches."""
        return sum((part.seconds for part in self.parts), 0.0) if self.parts else self.end - self.start

    def inside(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples that were taken in it, of samples in order of time."""
        return [sample for stretch in self.stretches for sample in between(samples, stretch.start, stretch.end)]

    def part(self, first: int, count: int) -> "Window":
        """Return `count` of its steps from index `first` on, of a window of one stretch. Its edges are where the device
        ended a step, by the steps' own times since the opening; no synchronisation was needed there.

        Raises: ValueError when a step has no time."""
        before, inside = self.steps[:first], self.steps[first : first + count]
        start = self.start + _seconds(before)
        whole = first + count >= len(self.steps)
        return Window(start, self.end if whole else start + _seconds(inside), inside, is_first=self.is_first)


def between(samples: Sequence[Sample], start: float, end: float) -> Sequence[Sample]:
    """Return the samples from `start` to `end`, both included, of samples in order of time."""
    first = bisect_left(samples, start, key=lambda sample: sample.t)
    return samples[first : bisect_right(samples, end, lo=first, key=lambda sample: sample.t)]


def find_window(events: Sequence[Event], name: str = "train") -> Window | None:
    """Return the window of this name; None without a complete stretch.

    A stretch is complete when it was closed and the loss of each of its steps has arrived: figures of half a stretch
    are not kept, nor those of a whole one with a part of its steps."""
    counted = counting(events)
    steps = {event.step: event for event in counted if isinstance(event, Step)}
    opened: WindowOpened | None = None
    found: list[Window] = []
    is_first = True
    for event in counted:
        if isinstance(event, Resumed) or (isinstance(event, PhaseBegan) and event.phase == Phase.start.value):
            opened, is_first = None, True
        elif isinstance(event, WindowOpened) and event.name == name:
            opened = event
        elif isinstance(event, WindowClosed) and event.name == name and opened is not None:
            numbers = range(opened.after_step + 1, event.after_step + 1)
            inside = tuple(steps[number] for number in numbers if number in steps)
            if inside and len(inside) == len(numbers) and event.t > opened.t:
                found.append(Window(opened.t, event.t, inside, is_first=is_first))
            opened, is_first = None, False
    return Window.joined(found) if found else None


def steady(window: Window) -> Window:
    """Return the window without its slow first steps: a compilation, or a warm-up that was too short. A slow step
    later on is part of what is measured, also after an evaluation or a checkpoint."""
    if window.parts:
        return Window.joined([steady(part) if part.is_first else part for part in window.parts])
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
