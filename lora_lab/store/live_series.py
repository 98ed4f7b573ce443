"""The series of a running job that its store does not have yet, thinned to what a store can take."""

import math
from collections import deque
from collections.abc import Sequence

from lora_lab.events import Evaluated, Event, Step
from lora_lab.job_events import JobPlanned
from lora_lab.store.record import Point, event_series
from lora_lab.telemetry.sampler import Sample

MOST_STEPS = 1000
"""About this many steps of a job are sent while it runs, evenly over its planned length. The record at its end has
more."""

MOST_AT_ONCE = 100
"""Steps in one batch. Each has a point in five series."""

SETTLED_SECONDS = 2.0
"""A step is sent no earlier: by then every reading of the sensors before it has arrived, so that its points are those
of the record."""


class LiveSeries:
    """Events on their way from the parent's event loop, which adds them, to the thread that sends them.

    It stays small whatever the store does: steps between two that are sent are dropped at once. They are in the
    trial's folder, and reach the store with the record."""

    def __init__(self, samples: Sequence[Sample], unix_minus_monotonic: float) -> None:
        """Begin without events.

        Args:
            samples: the readings so far; the sampler goes on adding to them.
            unix_minus_monotonic: seconds that turn an event's `t` into Unix time.
        """
        self._samples = samples
        self._offset = unix_minus_monotonic
        self._every = 1
        self._arrived: deque[Event] = deque()
        self._pending: list[Event] = []

    def see(self, event: Event) -> None:
        """Take in one event. This returns at once."""
        if isinstance(event, JobPlanned):
            self._every = math.ceil(event.steps / MOST_STEPS)
        elif isinstance(event, Step) and event.step > 1 and event.step % self._every:
            return
        elif isinstance(event, Step | Evaluated):
            self._arrived.append(event)

    def points(self, now: float) -> list[Point]:
        """Return what the store lacks, the same again until `sent` is called.

        Args:
            now: seconds of time.monotonic().
        """
        while self._arrived and self._arrived[0].t <= now - SETTLED_SECONDS:
            self._pending.append(self._arrived.popleft())
        steps = _evenly([event for event in self._pending if isinstance(event, Step)])
        self._pending = [*steps, *(event for event in self._pending if isinstance(event, Evaluated))]
        samples = self._samples[:]  # the sampler's thread adds to them meanwhile
        return list(event_series(self._pending, samples, self._offset))

    def sent(self) -> None:
        """Forget what `points` has returned: the store has it."""
        self._pending = []


def _evenly(steps: list[Step]) -> list[Step]:
    """Return at most MOST_AT_ONCE of the steps at even distances, the first and the last among them."""
    if len(steps) <= MOST_AT_ONCE:
        return steps
    return [steps[round(place * (len(steps) - 1) / (MOST_AT_ONCE - 1))] for place in range(MOST_AT_ONCE)]
