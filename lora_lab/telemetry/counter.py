"""Calculate how far a running energy counter moved between two moments, and how wrong that can be.

A card's counter stands still and then jumps, every 100 ms on most; it is read more often than that, or less. For a
value first seen by the reading at s, and not yet by the one before it at r, two things are certain of a counter that
sees all the time and is published at once: at most that value had been drawn by r, and at least that value by s. A
lowest and a highest energy for any window follow from these alone, whatever the power did between the ticks.

Neither assumption can be checked within a trial. A counter published L seconds late is further off by about
L x |power at the end - power at the start|; benchmarks/square_wave.py tests a card for both.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low

FEWEST_TICKS = 20
"""A counter that moved less often than this within the window says too little about it."""

STILL_SECONDS = 1.0
STILL_TICKS = 5
"""A counter stands still if it keeps its value for longer than a second and than this many of its usual ticks."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Joules between two moments. `error_joules` is a bound on what edges and sampling add: a prompt and complete
    sensor's true difference is no further away."""

    joules: float
    error_joules: float
    points: int = FEWEST_TICKS
    """Ticks of the counter, or readings of power, between the two moments."""


class CounterFault(ValueError):
    """The counter cannot be trusted."""


class TooFewTicks(ValueError):
    """The window is too short for this counter."""


@dataclass(frozen=True, slots=True)
class _Tick:
    value: float
    before: float
    """When the value before it was last seen; seconds."""
    seen: float
    """When it was first seen itself."""

    @property
    def t(self) -> float:
        return (self.before + self.seen) / 2


def between(start: float, end: float, readings: Sequence[tuple[float, float]], fewest: int = FEWEST_TICKS) -> Measured:
    """Return the joules from `start` to `end`, interpolated between the ticks on either side of each.

    Args:
        readings: (seconds, joules) in order of time.
        fewest: how many ticks there must be from `start` to `end`.

    Raises: CounterFault when it ran backwards, stood still, or was not read on both sides; TooFewTicks.
    """
    ticks = [_Tick(after[1], before[0], after[0]) for before, after in pairwise(readings) if after[1] != before[1]]
    first = bisect_right(ticks, start, key=lambda tick: tick.seen) - 1  # the last one seen by the start
    last = bisect_left(ticks, end, key=lambda tick: tick.before)  # the first not yet there at the end
    near = ticks[max(first, 0) : last + 1]
    fallen = next((pair for pair in pairwise(near) if pair[1].value < pair[0].value), None)
    if fallen:
        raise CounterFault(
            f"the energy counter ran backwards, from {fallen[0].value:.1f} to {fallen[1].value:.1f} J "
            "(a reset or a wrap)"
        )
    _check_counter_moves(start, end, readings, ticks)
    if first < 0 or last == len(ticks):
        raise CounterFault("the energy counter was not read on both sides of the window")
    inside = sum(start <= tick.seen <= end for tick in near)
    if inside < fewest:
        raise TooFewTicks(f"the window holds {inside} ticks of the energy counter, fewer than {fewest}")
    low_start, start_joules, high_start = _at(start, ticks)
    low_end, end_joules, high_end = _at(end, ticks)
    joules = end_joules - start_joules
    return Measured(joules, max(high_end - low_start - joules, joules - (low_end - high_start)), inside)


def _check_counter_moves(
    start: float, end: float, readings: Sequence[tuple[float, float]], ticks: Sequence[_Tick]
) -> None:
    # of all readings, not of the window's: there a standstill may be most of what is seen
    usual = median_low([after.seen - before.seen for before, after in pairwise(ticks)]) if len(ticks) > 2 else 0.0
    longest = max(STILL_SECONDS, STILL_TICKS * usual)
    since, still = readings[0] if readings else (0.0, 0.0), 0.0
    for t, value in readings:
        if value != since[1]:
            since = (t, value)
        still = max(still, min(t, end) - max(since[0], start))
    if still > longest:
        raise CounterFault(f"the energy counter stood still for {still:.1f} s")


def _at(t: float, ticks: Sequence[_Tick]) -> tuple[float, float, float]:
    """Return the (lowest, interpolated, highest) counter value at `t`."""
    lowest = ticks[bisect_right(ticks, t, key=lambda tick: tick.seen) - 1].value
    highest = ticks[bisect_left(ticks, t, key=lambda tick: tick.before)].value
    place = bisect_right(ticks, t, key=lambda tick: tick.t)
    before, after = ticks[place - 1], ticks[place]
    joules = before.value + (after.value - before.value) * (t - before.t) / (after.t - before.t)
    return lowest, joules, highest
