"""Energy of the window from the card's own sensors. Nothing here is modelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.window import Window

_FEWEST_TICKS = 20
"""A counter that moved less often than this within the window tells too little about it."""


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules the card drew during the window, idle draw included; or None and why."""

    joules: float | None
    source: str
    """counter, power or none."""
    reason: str = ""


def window_energy(window: Window, samples: Sequence[Sample]) -> Energy:
    """The counter's difference between the window's edges; where there is no counter, power over time."""
    if not samples:
        return Energy(None, "none", "no power sensor was read")
    counter = _counter_joules(window, samples)
    if counter.joules is not None or not all(sample.energy_joules is None for sample in samples):
        return counter
    return _power_joules(window, samples)


def _counter_joules(window: Window, samples: Sequence[Sample]) -> Energy:
    readings = [(s.t, s.energy_joules) for s in samples if s.energy_joules is not None]
    # the moments at which the counter was first seen at a new value
    ticks = readings[:1] + [after for before, after in pairwise(readings) if after[1] != before[1]]
    if any(after[1] < before[1] for before, after in pairwise(ticks)):
        return Energy(None, "none", "the card's energy counter ran backwards")
    inside = sum(window.start <= t <= window.end for t, _ in ticks)
    if inside < _FEWEST_TICKS:
        return Energy(
            None, "none", f"the window holds {inside} ticks of the energy counter, fewer than {_FEWEST_TICKS}"
        )
    if not ticks[0][0] <= window.start or not window.end <= ticks[-1][0]:
        return Energy(None, "none", "the energy counter was not read on both sides of the window")
    return Energy(_interpolated(ticks, window.end) - _interpolated(ticks, window.start), "counter")


def _interpolated(points: Sequence[tuple[float, float]], t: float) -> float:
    for (t0, v0), (t1, v1) in pairwise(points):
        if t0 <= t <= t1:
            return v0 + (v1 - v0) * (t - t0) / (t1 - t0)
    raise ValueError(f"{t} lies outside the readings")


def _power_joules(window: Window, samples: Sequence[Sample]) -> Energy:
    points = [(s.t, s.power_watts) for s in samples if s.power_watts is not None]
    if len(points) < 2 or points[0][0] > window.start or points[-1][0] < window.end:
        return Energy(None, "none", "the card has no energy counter, and power was not read over the whole window")
    inner = [(t, p) for t, p in points if window.start < t < window.end]
    edges = [(t, _interpolated(points, t)) for t in (window.start, window.end)]
    curve = [edges[0], *inner, edges[1]]
    return Energy(sum((p0 + p1) / 2 * (t1 - t0) for (t0, p0), (t1, p1) in pairwise(curve)), "power")
