"""Calculate what a card's sensors say of planted square waves of load: pure functions of waves and samples."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.reports import markdown
from lora_lab.telemetry.counter import CounterFault, Measured, TooFewTicks, between
from lora_lab.telemetry.energy import window_energy
from lora_lab.telemetry.sampler import Sample

SENSORS = ("counter", "instant", "average")
DELAYS = np.arange(-0.05, 0.6, 0.005)
"""Seconds that the counter may be late by, to choose from."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wave:
    """What is planned."""

    period: float
    """Seconds."""
    duty: float
    """Share of the period under load: 0 is rest, 1 is constant load."""
    repeat: int = 0

    @property
    def swings(self) -> bool:
        return 0 < self.duty < 1


@dataclass(frozen=True, slots=True)
class Planted:
    """A wave as it was: whole periods from `start` to `end`, in seconds of time.monotonic()."""

    wave: Wave
    start: float
    end: float
    loads: Sequence[tuple[float, float]]
    """(begin, seconds) of the load in each period, before and after the window too."""

    @property
    def inside(self) -> list[float]:
        return [seconds for begin, seconds in self.loads if self.start <= begin < self.end]

    @property
    def duty(self) -> float:
        return sum(self.inside) / (self.end - self.start)

    def busy_until(self, times: Any) -> Any:
        """Return the seconds of load before each time."""
        edges = [t for begin, seconds in self.loads for t in (begin, begin + seconds)]
        steps = [step for _, seconds in self.loads for step in (seconds, 0.0)]
        return np.interp(times, edges, np.cumsum([0.0, *steps[:-1]]))


def rows(planted: Sequence[Planted], samples: Sequence[Sample]) -> list[Row]:
    """Return what the sensors say of each wave, and what constant load and rest of the same session let expect.

    Raises: ValueError when constant load or rest has no energy, or load draws no more than rest."""
    seen = [_seen(each, [s for s in samples if each.loads[0][0] <= s.t]) for each in planted]
    constant, rest = _watts(planted, seen, 1.0), _watts(planted, seen, 0.0)
    if constant <= rest:
        raise ValueError(f"constant load draws {constant:.1f} W, no more than rest with {rest:.1f} W")
    for row, each in zip(seen, planted, strict=True):
        # between the products of constant load power has no time to fall
        duty = each.duty if each.wave.swings else each.wave.duty
        row["expected_joules"] = (each.end - each.start) * (duty * constant + (1 - duty) * rest)
        for sensor in SENSORS:
            joules = row[sensor].get("joules")
            row[f"{sensor}_ratio"] = None if joules is None else joules / row["expected_joules"]
        low, high = row.pop("tick_joules_5_95")
        tick = row["tick_seconds"]
        row["swing"] = None if tick is None else (high - low) / ((constant - rest) * tick)
        row["swing_if_complete"] = None if tick is None else largest_swing(each.wave.period, duty, tick)
    for repeat in {each.wave.repeat for each in planted}:
        of_repeat = [(row, each) for row, each in zip(seen, planted, strict=True) if each.wave.repeat == repeat]
        delay = _delay([pair for pair in of_repeat if pair[1].wave.swings], constant, rest)
        for row, _ in of_repeat:
            row["delay_seconds"] = delay
    for row in seen:
        del row["ticks"]
    return seen


def _seen(planted: Planted, samples: Sequence[Sample]) -> Row:
    start, end = planted.start, planted.end
    last = planted.loads[-1][0] + planted.wave.period
    samples = [s for s in samples if s.t <= last]
    readings = [(s.t, s.energy_joules) for s in samples if s.energy_joules is not None]
    try:
        counter: Measured | str = between(start, end, readings)
    except (CounterFault, TooFewTicks) as fault:
        counter = str(fault)
    power_alone = [replace(s, energy_joules=None) for s in samples]
    instant = window_energy(start, end, [replace(s, average_watts=None) for s in power_alone])
    average = window_energy(start, end, [replace(s, instant_watts=None) for s in power_alone])
    trial = window_energy(start, end, samples)
    moved = [((a[0] + b[0]) / 2, b[1] - a[1]) for a, b in pairwise(readings) if a[1] != b[1]]
    ticks = [(t0, t1, joules) for (t0, _), (t1, joules) in pairwise(moved) if start <= t0 and t1 <= end]
    lengths = [t1 - t0 for t0, t1, _ in ticks]
    within = [s for s in samples if start <= s.t <= end]
    capped = [(s.t, s.power_cap_seconds) for s in within if s.power_cap_seconds is not None]
    (t0, capped0), (t1, capped1) = (capped[0], capped[-1]) if len(capped) > 1 else ((0.0, 0.0), (0.0, 0.0))
    return {
        "period_asked": planted.wave.period,
        "duty_asked": planted.wave.duty,
        "repeat": planted.wave.repeat,
        "seconds": end - start,
        "period": (end - start) / len(planted.inside),
        "duty": planted.duty,
        "counter": _said(counter),
        "instant": _said(instant.power or instant.reason),
        "average": _said(average.power or average.reason),
        "trial": {"joules": trial.joules, "source": trial.source, "reason": trial.reason},
        "ticks": ticks,
        "tick_count": len(ticks),
        "tick_seconds": statistics.median(lengths) if ticks else None,
        "tick_longest_seconds": max(lengths, default=None),
        "tick_joules_5_95": np.percentile([joules for *_, joules in ticks], [5, 95]) if ticks else (0.0, 0.0),
        "sm_mhz": _median([s.sm_mhz for s in within]),
        "celsius": _median([s.temperature_celsius for s in within]),
        "power_cap_share": (capped1 - capped0) / (t1 - t0) if t1 > t0 else None,
    }


def _said(measured: Measured | str) -> Row:
    if isinstance(measured, str):
        return {"absent": measured}
    return {"joules": measured.joules, "error_joules": measured.error_joules}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _watts(planted: Sequence[Planted], seen: Sequence[Row], duty: float) -> float:
    """Return the mean power of constant load or of rest, by the source that a trial would use."""
    found = [(row, each) for row, each in zip(seen, planted, strict=True) if each.wave.duty == duty]
    without = next((row["trial"]["reason"] for row, _ in found if row["trial"]["joules"] is None), None)
    if without is not None:
        raise ValueError(f"there is no energy of {'constant load' if duty else 'rest'}: {without}")
    return statistics.mean(row["trial"]["joules"] / row["seconds"] for row, _ in found)


def largest_swing(period: float, duty: float, tick: float) -> float:
    """Return by how much the load within a tick can differ from one tick to another, as a share of the tick."""
    rest = tick % period
    return (min(rest, duty * period) - max(0.0, rest - (1 - duty) * period)) / tick


def _delay(waves: Sequence[tuple[Row, Planted]], constant: float, rest: float) -> float | None:
    """Return how many seconds late the counter's ticks fit the load best; None without ticks."""
    squares = np.zeros(len(DELAYS))
    for row, each in waves:
        for begin, end, joules in row["ticks"]:
            load = each.busy_until(end - DELAYS) - each.busy_until(begin - DELAYS)
            squares += (joules - rest * row["tick_seconds"] - (constant - rest) * load) ** 2
    return float(DELAYS[squares.argmin()]) if squares.any() else None


def by_period(seen: Sequence[Row], sensor: str) -> list[Row]:
    """Return by asked period: the ratios' median and range, the largest difference between repeats (None with one),
    and how far they lie in the mean off the straight line over 1/period through all of their duty (None below three
    periods)."""
    waves = [row for row in seen if 0 < row["duty_asked"] < 1 and row[f"{sensor}_ratio"] is not None]
    periods = sorted({row["period_asked"] for row in waves})
    of = {period: [row for row in waves if row["period_asked"] == period] for period in periods}
    line = {}
    for duty in {row["duty_asked"] for row in waves} if len(periods) > 2 else ():
        points = [(1 / row["period"], row[f"{sensor}_ratio"]) for row in waves if row["duty_asked"] == duty]
        line[duty] = np.polyfit(*np.array(points).T, 1)
    found = []
    for period in periods:
        ratios = [row[f"{sensor}_ratio"] for row in of[period]]
        repeats: dict[float, list[float]] = {}
        for row, ratio in zip(of[period], ratios, strict=True):
            repeats.setdefault(row["duty_asked"], []).append(ratio)
        off = [r[f"{sensor}_ratio"] - np.polyval(line[r["duty_asked"]], 1 / r["period"]) for r in of[period] if line]
        found.append(
            {
                "sensor": sensor,
                "period": period,
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "between_repeats": max((max(r) - min(r) for r in repeats.values() if len(r) > 1), default=None),
                "off_the_line": float(np.mean(off)) if off else None,
            }
        )
    return found


def page(seen: Sequence[Row]) -> str:
    """Return the sentences and the tables of the report."""
    return "\n\n".join([summary(seen), _all(seen)])


def summary(seen: Sequence[Row]) -> str:
    """Return what the counter is off and late by, and the table of sensors by period."""
    waves = [row for row in seen if 0 < row["duty_asked"] < 1 and row["counter_ratio"] is not None]
    beyond = sum(abs(r["counter"]["joules"] - r["expected_joules"]) > r["counter"]["error_joules"] for r in waves)
    delays = {row["repeat"]: row["delay_seconds"] for row in seen if row["delay_seconds"] is not None}
    late = ", ".join(f"{delay * 1e3:.0f} ms" for _, delay in sorted(delays.items())) or "not known, it has no ticks"
    said = f"The counter is further from the expected energy than its bound in {beyond} of {len(waves)} waves. "
    said += f"It is late by, in each repeat: {late}."
    head = ["sensor", "period, ms", "sensor / expected", "lowest", "highest", "between repeats", "off the line"]
    lines = [
        [each["sensor"], f"{each['period'] * 1e3:g}"]
        + [_cell(each[name], ".4f") for name in ("median", "lowest", "highest", "between_repeats")]
        + [_cell(each["off_the_line"], "+.4f")]
        for sensor in SENSORS
        for each in by_period(seen, sensor)
    ]
    return f"{said}\n\n{markdown(head, lines)}"


def _all(seen: Sequence[Row]) -> str:
    """Return the table of every wave."""
    columns = {"expected J": ("expected_joules", ".1f"), "counter / expected": ("counter_ratio", ".4f")}
    columns |= {"instant / expected": ("instant_ratio", ".4f"), "average / expected": ("average_ratio", ".4f")}
    columns |= {"tick, s": ("tick_seconds", ".3f"), "longest": ("tick_longest_seconds", ".3f")}
    columns |= {"swing": ("swing", ".2f"), "if complete": ("swing_if_complete", ".2f"), "SM MHz": ("sm_mhz", ".0f")}
    columns |= {"degrees C": ("celsius", ".0f"), "at power limit": ("power_cap_share", ".1%")}
    lines = []
    for row in sorted(seen, key=lambda row: (row["period_asked"], row["duty_asked"], row["repeat"])):
        counter = row["counter"].get("absent") or "{joules:.1f} ± {error_joules:.1f}".format(**row["counter"])
        first = [f"{row['period'] * 1e3:.1f}", f"{row['duty']:.3f}", str(row["repeat"]), counter]
        lines.append([*first, *(_cell(row[name], form) for name, form in columns.values())])
    return markdown(["period, ms", "duty", "repeat", "counter J, bound", *columns], lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
