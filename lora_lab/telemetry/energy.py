"""Energy of a window from the machine's own sensors. Nothing here is modelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_lab.telemetry.counter import FEWEST_TICKS, CounterFault, Measured, TooFewTicks, between
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.window import Window

DISAGREEMENT_REFUSED = 0.10
"""A counter further than this from the integrated power, beyond what both may be wrong by, is not used."""

DISAGREEMENT_TOLD = 0.03
"""Beyond this the run says so."""

AVERAGE_SECONDS = 1.0
"""Over which the driver averages `average_watts`."""

LONGEST_GAP_SECONDS = 1.0
"""Power that was not read for longer is not integrated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Joules the card drew during a window, idle draw included; or None and why."""

    joules: float | None = None
    error_joules: float | None = None
    """How far off `joules` can be because counter and power are known at certain moments only. What the sensor
    itself is wrong by (2 to 8 %, arXiv 2312.02741) is not in it."""
    source: str = "none"
    """counter, instant_power, average_power or none."""
    reason: str = ""
    """Why there are no joules, or why a better source was not used."""
    power: Measured | None = None
    """The integral of power over the same window."""
    disagreement: float | None = None
    """Integral of power over the counter's joules, less 1; only where both are there."""


def window_energy(start: float, end: float, samples: Sequence[Sample]) -> Energy:
    """The counter's difference between two moments; where it can't be believed, the integral of power.

    Args:
        start: seconds of time.monotonic(), as `end`.
    """
    power, power_source, why_no_power = _power(start, end, samples)
    readings = [(s.t, s.energy_joules) for s in samples if s.energy_joules is not None]
    if not readings:
        reason = "the card has no energy counter"
    else:
        try:
            counter = between(start, end, readings)
        except TooFewTicks as fault:  # and power's own ticks are no shorter
            return Energy(reason=str(fault), power=power)
        except CounterFault as fault:
            reason = str(fault)
        else:
            disagreement = power.joules / counter.joules - 1 if power and counter.joules > 0 else None
            reason = _contradiction(counter, power)
            if not reason:
                return Energy(
                    joules=counter.joules,
                    error_joules=counter.error_joules,
                    source="counter",
                    power=power,
                    disagreement=disagreement,
                )
    if power is None:
        return Energy(reason=f"{reason}; {why_no_power}")
    return Energy(joules=power.joules, error_joules=power.error_joules, source=power_source, reason=reason, power=power)


def _contradiction(counter: Measured, power: Measured | None) -> str:
    if power is None:
        return ""
    apart = abs(power.joules - counter.joules) - counter.error_joules - power.error_joules
    if apart <= DISAGREEMENT_REFUSED * max(counter.joules, power.joules):
        return ""
    return (
        f"the energy counter says {counter.joules:.1f} J where the integral of power is {power.joules:.1f} J, "
        f"more than {DISAGREEMENT_REFUSED:.0%} apart"
    )


def _power(start: float, end: float, samples: Sequence[Sample]) -> tuple[Measured | None, str, str]:
    """(the integral, its source, why there is none)."""
    instant = [(s.t, s.instant_watts) for s in samples if s.instant_watts is not None]
    average = [(s.t, s.average_watts) for s in samples if s.average_watts is not None]
    if instant:
        source, points, lag = "instant_power", instant, 0.0
    elif average:
        source, points, lag = "average_power", average, AVERAGE_SECONDS
    else:
        return None, "none", "its power is not read"
    # a mean over the last second tells best of half a second ago
    a, b = start + lag / 2, end + lag / 2
    if len(points) < 2 or points[0][0] > a or points[-1][0] < b:
        return None, "none", "power was not read over the whole window"
    inside = [(t, watts) for t, watts in points if a < t < b]
    if len(inside) < FEWEST_TICKS:
        return None, "none", f"the window holds {len(inside)} readings of power, fewer than {FEWEST_TICKS}"
    curve = [(a, _interpolated(points, a)), *inside, (b, _interpolated(points, b))]
    gap = max(t1 - t0 for (t0, _), (t1, _) in pairwise(curve))
    if gap > LONGEST_GAP_SECONDS:
        return None, "none", f"power was not read for {gap:.1f} s"
    joules = sum((p0 + p1) / 2 * (t1 - t0) for (t0, p0), (t1, p1) in pairwise(curve))
    # between two readings power is taken to lie between them: half the difference to either side
    error = sum(abs(p1 - p0) / 2 * (t1 - t0) for (t0, p0), (t1, p1) in pairwise(curve))
    watts = [p for _, p in curve]
    # at each edge the mean's weight is off by at most a half over half its length, to either side
    error += lag / 4 * (max(watts) - min(watts))
    return Measured(joules, error), source, ""


def _interpolated(points: Sequence[tuple[float, float]], t: float) -> float:
    for (t0, v0), (t1, v1) in pairwise(points):
        if t0 <= t <= t1:
            return v0 + (v1 - v0) * (t - t0) / (t1 - t0)
    raise ValueError(f"{t} lies outside the readings")


def cpu_energy(window: Window, samples: Sequence[Sample]) -> Measured | str:
    """Joules of all CPU packages in the window, whoever used them; or why there are none."""
    readings = [(s.t, s.cpu_joules) for s in samples if s.cpu_joules is not None]
    if not readings:
        return "no CPU energy was read"
    try:
        return between(window.start, window.end, readings)
    except (CounterFault, TooFewTicks) as fault:
        return str(fault)
