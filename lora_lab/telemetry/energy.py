"""Measure the energy of a window with the machine's own sensors. Nothing here is modelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_lab.telemetry.counter import FEWEST_TICKS, CounterFault, Measured, TooFewTicks, between
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.window import Window
from lora_lab.telemetry.window import between as samples_between

DISAGREEMENT_REFUSED = 0.10
"""A counter is not used if it differs from the integrated power by more than this, beyond the errors of both."""

DISAGREEMENT_TOLD = 0.03
"""Above this difference the run has a warning."""

AVERAGE_SECONDS = 1.0
"""Over which the driver averages `average_watts`."""

LONGEST_GAP_SECONDS = 1.0
"""Gaps longer than this are not integrated over."""

_NEAR_SECONDS = 30.0
"""A job's stretch is measured by readings up to this long before and after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Joules that the card drew during a window, idle power included; or None and why."""

    joules: float | None = None
    error_joules: float | None = None
    """How far off `joules` can be because counter and power are known only at certain moments, if the sensor sees all
    the time and is published at once. Its own error (2 to 8 %, arXiv 2312.02741) is not included."""
    source: str = "none"
    """counter, instant_power, average_power or none."""
    reason: str = ""
    """Why there are no joules, or why a better source was not used."""
    power: Measured | None = None
    """The integral of power over the same window."""
    disagreement: float | None = None
    """Integral of power divided by the counter's joules, minus 1; only where both exist."""
    points: int = 0
    """Ticks or readings of the source between the two moments."""


def energy_of(window: Window, samples: Sequence[Sample]) -> tuple[Energy, Window]:
    """Return the energy of a window, and the part of the window that it is of.

    A job's stretches are measured one by one and summed, and so are their errors. Each stretch has two edges, at which
    the counter is known only as well as it ticks and is read; many short stretches therefore have a wide bound. A
    stretch whose energy is not known is left out, with its steps and seconds.

    The energy of several cards is their sum. Where that of one is not known, there is none.
    """
    cards = sorted({sample.card for sample in samples})
    each = [_energy_of_card(window, [sample for sample in samples if sample.card == card]) for card in cards]
    if len(each) < 2:
        return each[0] if each else (window_energy(window.start, window.end, samples), window)
    for card, (energy, _) in zip(cards, each, strict=True):
        if energy.joules is None:
            return Energy(reason=f"card {card} of {len(cards)}: {energy.reason}"), window
    if any(part != each[0][1] for _, part in each):
        return Energy(reason="not the same stretches are known of all cards"), window
    return _together([energy for energy, _ in each]), each[0][1]


def _energy_of_card(window: Window, samples: Sequence[Sample]) -> tuple[Energy, Window]:
    if not window.parts:
        return window_energy(window.start, window.end, samples), window
    each = [(part, window_energy(part.start, part.end, _near(part, samples), fewest=0)) for part in window.parts]
    known = [(part, energy) for part, energy in each if energy.joules is not None]
    points = sum(energy.points for _, energy in known)
    if not known:
        return each[-1][1], window
    if points < FEWEST_TICKS:
        return Energy(reason=f"the stretches hold {points} readings of new energy, fewer than {FEWEST_TICKS}"), window
    return _together([energy for _, energy in known]), Window.joined([part for part, _ in known])


def _near(part: Window, samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples_between(samples, part.start - _NEAR_SECONDS, part.end + _NEAR_SECONDS)


def _together(found: Sequence[Energy]) -> Energy:
    """Return the sum of known energies."""
    joules = sum(energy.joules or 0.0 for energy in found)
    powers = [energy.power for energy in found if energy.power is not None]
    power = None
    if len(powers) == len(found):
        power = Measured(sum(each.joules for each in powers), sum(each.error_joules for each in powers))
    sources = dict.fromkeys(energy.source for energy in found)
    return Energy(
        joules=joules,
        error_joules=sum(energy.error_joules or 0.0 for energy in found),
        source=" and ".join(sources),
        reason="; ".join(dict.fromkeys(energy.reason for energy in found if energy.reason)),
        power=power,
        disagreement=power.joules / joules - 1 if power and joules > 0 and [*sources] == ["counter"] else None,
        points=sum(energy.points for energy in found),
    )


def window_energy(start: float, end: float, samples: Sequence[Sample], fewest: int = FEWEST_TICKS) -> Energy:
    """Return the counter's difference between two moments, or the integral of power where the counter cannot be
    trusted.

    Args:
        start: seconds of time.monotonic(), as `end`.
        fewest: how many ticks or readings there must be between them.
    """
    powers: dict[str, Measured] = {}
    no_power: list[str] = []
    for name, field, seconds in (("instant", "instant_watts", 0.0), ("average", "average_watts", AVERAGE_SECONDS)):
        points = [(s.t, watts) for s in samples if (watts := getattr(s, field)) is not None]
        found = _integral(start, end, points, seconds, f"{name} power", fewest)
        if isinstance(found, Measured):
            powers[f"{name}_power"] = found
        elif not powers:
            no_power.append(found)
    source, power = next(iter(powers.items()), ("none", None))
    readings = [(s.t, s.energy_joules) for s in samples if s.energy_joules is not None]
    try:
        counter = between(start, end, readings, fewest)
    except TooFewTicks as fault:  # and power's own ticks are no shorter
        return Energy(reason=str(fault), power=power)
    except CounterFault as fault:
        no_counter = str(fault) if readings else "the card has no energy counter"
    else:
        if power is None or not _is_contradicted(counter, power, powers.get("average_power", power)):
            return Energy(
                joules=counter.joules,
                error_joules=counter.error_joules,
                source="counter",
                power=power,
                disagreement=power.joules / counter.joules - 1 if power and counter.joules > 0 else None,
                points=counter.points,
            )
        no_counter = (
            f"the energy counter says {counter.joules:.1f} J where the integral of power is {power.joules:.1f} J, "
            f"more than {DISAGREEMENT_REFUSED:.0%} apart"
        )
    reason = "; ".join([no_counter, *no_power])
    if power is None:
        return Energy(reason=reason)
    return Energy(
        joules=power.joules,
        error_joules=power.error_joules,
        source=source,
        reason=reason,
        power=power,
        points=power.points,
    )


def _is_contradicted(counter: Measured, power: Measured, average: Measured) -> bool:
    # readings in step with a wave see one side of it alone: the driver's mean may then speak for the counter
    nearer = abs(average.joules - counter.joules) < abs(average.joules - power.joules)
    return _are_apart(counter, power) and (_are_apart(counter, average) or not nearer)


def _are_apart(counter: Measured, power: Measured) -> bool:
    beyond_errors = abs(power.joules - counter.joules) - counter.error_joules - power.error_joules
    return beyond_errors > DISAGREEMENT_REFUSED * max(counter.joules, power.joules)


def _integral(
    start: float, end: float, points: Sequence[tuple[float, float]], lag: float, name: str, fewest: int
) -> Measured | str:
    """Integrate power, or say why that is impossible.

    Args:
        points: (seconds, watts) in order of time.
        lag: seconds over which each of them is a mean; it describes best the moment half of that ago.
        fewest: how many there must be within.
    """
    if not points:
        return f"{name} was not read"
    start, end = start + lag / 2, end + lag / 2
    if points[0][0] > start or points[-1][0] < end:
        return f"{name} was not read over the whole window"
    inside = sum(start < t < end for t, _ in points)
    if inside < fewest:
        return f"the window holds {inside} readings of {name}, fewer than {fewest}"
    pieces = [pair for pair in pairwise(points) if pair[0][0] < end and pair[1][0] > start]
    gap = max(t1 - t0 for (t0, _), (t1, _) in pieces)
    if gap > LONGEST_GAP_SECONDS:
        return f"{name} was not read for {gap:.1f} s"
    joules = error = 0.0
    for (t0, p0), (t1, p1) in pieces:
        a, b = max(t0, start), min(t1, end)
        mean = p0 + (p1 - p0) * ((a + b) / 2 - t0) / (t1 - t0)
        joules += mean * (b - a)
        # between two readings power is taken to lie between them
        error += max(abs(p0 - mean), abs(p1 - mean)) * (b - a)
    watts = [p for piece in pieces for _, p in piece]
    # at each edge the mean's weight is off by at most a half over half its length, to either side: an eighth of that
    # length for a change of power there, of which as little as half is seen within
    error += 2 * lag / 4 * (max(watts) - min(watts))
    return Measured(joules, error, inside)


def cpu_energy(window: Window, samples: Sequence[Sample]) -> Measured | str:
    """Return the joules of all CPU packages in the window, whoever used them; or why there are none. In a job, each of
    its stretches must have them."""
    of_cpu = [s for s in samples if s.cpu_joules is not None]
    if not of_cpu:
        return "no CPU energy was read"
    try:
        found = [
            between(
                part.start,
                part.end,
                [(s.t, s.cpu_joules or 0.0) for s in (_near(part, of_cpu) if window.parts else of_cpu)],
                fewest=0 if window.parts else FEWEST_TICKS,
            )
            for part in window.stretches
        ]
    except (CounterFault, TooFewTicks) as fault:
        return str(fault)
    points = sum(each.points for each in found)
    if points < FEWEST_TICKS:
        return f"the stretches hold {points} ticks of the CPU's counter, fewer than {FEWEST_TICKS}"
    return Measured(sum(each.joules for each in found), sum(each.error_joules for each in found), points)
