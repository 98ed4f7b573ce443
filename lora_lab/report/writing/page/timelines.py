"""A trial's steps and power over time, reduced to what a small picture can show.

The page draws these itself: a hundred of matplotlib's would take ten seconds and several megabytes."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_lab.store.trials import Trial

STEP_SECONDS = "step/seconds"
POWER_WATTS = "card/power_watts"

Series = Sequence[tuple[int, int, float]]
"""Unix time in ms, step, value."""

WIDTH, HEIGHT = 320.0, 62.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 34.0, 314.0, 14.0, 58.0
_MOST_READINGS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One series against time; places in units of the picture."""

    title: str
    path: str
    """What <path d> draws."""
    top: str
    """The value at the upper edge; the lower is 0."""
    median: float | None
    """Height of the median line."""
    median_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A trial's panels on one time axis, in seconds from its first reading."""

    panels: tuple[Panel, ...]
    window: tuple[float, float] | None
    """Left and right edge of the measured window (the steps after warm-up)."""
    ticks: tuple[tuple[float, str], ...]


def timeline(trial: Trial, series: Mapping[str, Series]) -> Timeline | None:
    """Build a trial's timeline; None if it has neither series."""
    steps, power = _finite(series.get(STEP_SECONDS, ())), _finite(series.get(POWER_WATTS, ()))
    if not steps and not power:
        return None
    starts = [time - 1000 * value for time, _, value in steps] + [time for time, _, _ in power]
    zero, end = min(starts), max(time for time, _, _ in [*steps, *power])
    length = max(end - zero, 1.0) / 1000

    def x(time_ms: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (time_ms - zero) / 1000 / length

    measured = _measured(trial, steps)
    window = (x(measured[0][0] - 1000 * measured[0][2]), x(measured[-1][0])) if measured else None
    panels = []
    if steps:
        panels.append(_steps_panel(steps, measured, x_of=[(x(t - 1000 * v), x(t)) for t, _, v in steps]))
    if power:
        panels.append(_power_panel(power, measured, x_of=[x(t) for t, _, _ in power]))
    return Timeline(panels=tuple(panels), window=window, ticks=_ticks(length))


def _finite(series: Series) -> list[tuple[int, int, float]]:
    return sorted(point for point in series if math.isfinite(point[2]))


def _measured(trial: Trial, steps: Series) -> list[tuple[int, int, float]]:
    """Return the steps after warm-up; none if the trial did not get there, or did not record its warm-up."""
    told = trial.params.get("measure.warmup_steps", "")
    return [point for point in steps if point[1] > int(told)] if told.isdigit() else []


def _steps_panel(steps: Series, measured: Series, x_of: Sequence[tuple[float, float]]) -> Panel:
    top = _round_up(max(value for _, _, value in steps))
    parts = [f"M{left:.1f} {_y(v, top):.1f}H{right:.1f}" for (left, right), (_, _, v) in zip(x_of, steps, strict=True)]
    median = statistics.median(value for _, _, value in measured) if measured else None
    return Panel(
        title="step time, s",
        path="".join(parts),
        top=f"{top:g}",
        median=None if median is None else _y(median, top),
        median_text="" if median is None else f"median {median:.3g} s",
    )


def _power_panel(power: Series, measured: Series, x_of: Sequence[float]) -> Panel:
    top = _round_up(max(value for _, _, value in power))
    places = [(x, _y(value, top)) for x, (_, _, value) in zip(x_of, power, strict=True)]
    inside: list[float] = []
    if measured:
        first, last = measured[0][0] - 1000 * measured[0][2], measured[-1][0]
        inside = [value for time, _, value in power if first <= time <= last]
    median = statistics.median(inside) if inside else None
    drawn = [f"{x:.1f} {y:.1f}" for x, y in _thinned(places)]
    return Panel(
        title="power, W",
        path="M" + "L".join(drawn),
        top=f"{top:g}",
        median=None if median is None else _y(median, top),
        median_text="" if median is None else f"median {median:.0f} W",
    )


def _thinned(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Thin out points to the highest and lowest of each stretch, so that peaks stay."""
    if len(places) <= _MOST_READINGS:
        return list(places)
    each = math.ceil(2 * len(places) / _MOST_READINGS)
    kept = []
    for start in range(0, len(places), each):
        stretch = places[start : start + each]
        ends = {min(stretch, key=lambda place: place[1]), max(stretch, key=lambda place: place[1])}
        kept += sorted(ends)
    return kept


def _y(value: float, top: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * value / top


def _round_up(value: float) -> float:
    """Round up to the next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(float(f"{step * power:.6g}") for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 20) if step * power >= value)


def _ticks(length: float) -> tuple[tuple[float, str], ...]:
    every = _round_up(length / 6)
    marks = [index * every for index in range(int(length / every + 1e-9) + 1)]
    return tuple((_LEFT + (_RIGHT - _LEFT) * mark / length, f"{mark:g}") for mark in marks)
