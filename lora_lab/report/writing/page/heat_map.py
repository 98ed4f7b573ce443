"""The grid of a sweep as a table of coloured cells: medians where trials finished, outcomes in words where not."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib

from lora_lab.outcome import Outcome
from lora_lab.report.answers.pareto import Point
from lora_lab.report.measures import Better, Measure
from lora_lab.report.statistics.factors import Factor
from lora_lab.report.writing.labels import count, level_text, levels_text, outcome_text, usual_levels

_LIGHT, _DARK = "#ffffff", "#000000"
_MANY_TIMES = 2.0
"""Largest over smallest value from which colours follow the logarithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Colour:
    """A background and the text colour that is readable on it."""

    background: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One point."""

    value: str
    """The median, without its unit; "" when no trial has one."""
    colour: Colour | None
    trials: str
    """How many trials the median is of."""
    outcomes: tuple[str, ...]
    """How the others ended, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """One measure over all points."""

    measure: Measure
    column_factor: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    """A row's label, and its cells; None where nothing was tried."""
    legend: tuple[tuple[str, Colour], ...]
    """Values with their colours, from lowest to highest; empty when no trial has a figure."""
    better: str
    usual: str
    """What labels leave out: settings that most points share."""


def heat_map(points: Sequence[Point], factors: Sequence[Factor], measure: Measure) -> HeatMap:
    """Columns are the levels of the factor that has most of them, rows what the other factors combine to."""
    across = max(factors, key=lambda factor: len(factor.levels), default=None)
    usual = usual_levels(points, [factor for factor in factors if factor is not across])
    cells: dict[str, dict[str, Cell]] = {}
    medians = [point.figures[measure.name][0] for point in points if measure.name in point.figures]
    for point in sorted(points, key=lambda point: sum(point.levels[name] != level for name, level in usual.items())):
        row = levels_text(point.levels, factors, usual, without=across.name if across else None)
        column = point.levels[across.name] if across else ""
        cells.setdefault(row, {})[column] = _cell(point, measure, medians)
    columns = [level for level in (across.levels if across else ("",)) if any(level in row for row in cells.values())]
    return HeatMap(
        measure=measure,
        column_factor=across.name if across else "",
        columns=tuple(level_text(across, level) if across else "" for level in columns),
        rows=tuple((label, tuple(row.get(level) for level in columns)) for label, row in cells.items()),
        legend=_legend(measure, medians),
        better="higher is better" if measure.better is Better.higher else "lower is better",
        usual=_usual_text(usual, factors),
    )


def _usual_text(usual: Mapping[str, str], factors: Sequence[Factor]) -> str:
    return ", ".join(level_text(factor, usual[factor.name]) for factor in factors if factor.name in usual)


def _cell(point: Point, measure: Measure, medians: Sequence[float]) -> Cell:
    told = point.figures.get(measure.name)
    with_figure = sum(trial.finished and measure.of(trial) is not None for trial in point.trials)
    return Cell(
        value="" if told is None else measure.form.format(told[0]),
        colour=None if told is None else colour(told[0], medians),
        trials="" if told is None else count(with_figure, "trial"),
        outcomes=tuple(_outcomes(point)),
    )


def _outcomes(point: Point) -> list[str]:
    """Return outcomes of trials that did not finish, with the memory asked for when it ran out."""
    ended = Counter(trial.outcome for trial in point.trials if not trial.finished)
    told = []
    for outcome, number in ended.items():
        text = outcome_text(outcome) + (f", {count(number, 'trial')}" if number > 1 else "")
        asked = [trial.metrics.get("out_of_memory/asked_gib") for trial in point.trials if trial.outcome == outcome]
        known = [value for value in asked if value is not None]
        if outcome == Outcome.out_of_memory.value and known:
            text += f": asked for {max(known):.2f} GiB more"
        told.append(text)
    return told


def colour(value: float, values: Sequence[float]) -> Colour:
    """Return a value's colour among all values, in cividis (readable with any colour vision)."""
    at = _along(value, values)
    red, green, blue, _ = matplotlib.colormaps["cividis"](at)
    return _readable(red, green, blue)


def _along(value: float, values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    if high <= low:
        return 0.75
    if low > 0 and high / low > _MANY_TIMES:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _readable(red: float, green: float, blue: float) -> Colour:
    """Text in black or white, whichever stands out more (WCAG 2.2, relative luminance)."""
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    on_white, on_black = 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05
    background = "#" + "".join(f"{round(255 * each):02x}" for each in (red, green, blue))
    return Colour(background=background, text=_LIGHT if on_white > on_black else _DARK)


def _legend(measure: Measure, medians: Sequence[float]) -> tuple[tuple[str, Colour], ...]:
    if not medians:
        return ()
    low, high = min(medians), max(medians)
    if high <= low:
        return ((measure.form.format(low), colour(low, medians)),)
    by_ratio = low > 0 and high / low > _MANY_TIMES
    steps = [each / 4 for each in range(5)]
    values = [low * (high / low) ** step if by_ratio else low + step * (high - low) for step in steps]
    return tuple((measure.form.format(value), colour(value, medians)) for value in values)
