"""Differences with their intervals as bars on a common axis, in percent of the axis' width: the page draws them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from lora_lab.report.measures import Measure
from lora_lab.report.statistics.attribution import FactorPart, Split
from lora_lab.report.statistics.contrasts import Contrast
from lora_lab.report.statistics.estimates import Estimate, percent
from lora_lab.report.statistics.factors import Factor
from lora_lab.report.writing.labels import count, level_text, regime_text
from lora_lab.report.writing.numbers import format_estimate, interval_note

_LARGE = math.log(1.5)
"""Factors with a larger log ratio than this get an axis of their own, in ratios."""
_RATIOS = (
    (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5),
    (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0),
    (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
    tuple(10.0**power for power in range(-6, 7)),
)
"""Ticks of a logarithmic axis, from fine to coarse."""
_APART = 13.0
"""Percent of the width that a tick's text needs."""
_EDGE = 3.0
"""Percent of the width at either end where a tick's text would hang over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A mark of an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One difference. Places are in percent of the axis' width."""

    label: str
    notes: tuple[str, ...]
    words: str
    at: float
    low: float
    """Left end of the interval; the same as `at` without one."""
    high: float
    start: float
    """Where a part of a sum begins: at the end of the part before it. 0 on the axis for a difference that stands
    alone."""
    cut_low: bool
    """Whether the interval goes on beyond the axis."""
    cut_high: bool
    seen: bool | None
    part: bool = False
    """Whether it is one of several that add up to a total."""
    total: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars on one axis."""

    title: str
    unit: str
    zero: float
    ticks: tuple[Tick, ...]
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    """By factor; "" where there is but one."""


class _Axis:
    """From values on a measure's scale to percent of the width."""

    def __init__(self, values: Sequence[float], most: float, measure: Measure, by_ratio: bool) -> None:
        low = max(min(0.0, *values), -most)
        high = min(max(0.0, *values), most)
        margin = 0.06 * (high - low) or 0.05
        self.low, self.high = low - margin, high + margin
        self._measure, self._by_ratio = measure, by_ratio

    def at(self, value: float) -> float:
        kept = min(max(value, self.low), self.high)
        return round(100.0 * (kept - self.low) / (self.high - self.low), 2)

    def ticks(self) -> tuple[Tick, ...]:
        if not self._measure.ratios:
            return self._inside([(value, f"{value:+.3g}" if value else "0") for value in _nice(self.low, self.high)])
        if self._by_ratio:
            tried = [self._inside([(math.log(each), f"x{each:g}") for each in ratios]) for ratios in _RATIOS]
            return next((ticks for ticks in tried if len(ticks) > 1 and _apart(ticks)), tried[-1])
        nice = _nice(percent(self.low), percent(self.high))
        return self._inside(
            [(math.log1p(each / 100), f"{each:+.3g} %" if each else "0") for each in nice if each > -100]
        )

    def _inside(self, marks: Sequence[tuple[float, str]]) -> tuple[Tick, ...]:
        return tuple(
            Tick(at=self.at(value), text=text) for value, text in marks if _EDGE <= self.at(value) <= 100 - _EDGE
        )


def _apart(ticks: Sequence[Tick]) -> bool:
    return all(right.at - left.at >= _APART for left, right in itertools.pairwise(ticks))


def _nice(low: float, high: float) -> list[float]:
    return [float(each) for each in MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low, high)]


def forests(contrasts: Sequence[Contrast], factors: Sequence[Factor], measure: Measure) -> list[Bars]:
    """Return a measure's contrasts by factor and regime: small ones on an axis in percent, large ones on another in
    ratios."""
    ours = [each for each in contrasts if each.measure.name == measure.name]
    by_factor = {factor: [each for each in ours if each.factor == factor.name] for factor in factors}
    by_factor = {factor: those for factor, those in by_factor.items() if those}
    large = {
        factor.name
        for factor, those in by_factor.items()
        if measure.ratios and max(abs(each.estimate.value) for each in those) > _LARGE
    }
    made = []
    for by_ratio in (False, True):
        chosen = {factor: those for factor, those in by_factor.items() if (factor.name in large) is by_ratio}
        if chosen:
            made.append(_forest(chosen, measure, by_ratio=by_ratio))
    return made


def _forest(by_factor: Mapping[Factor, Sequence[Contrast]], measure: Measure, *, by_ratio: bool) -> Bars:
    estimates = [each.estimate for those in by_factor.values() for each in those]
    axis = _Axis(_ends(estimates), _most(estimates, measure), measure, by_ratio)
    groups = []
    for factor, those in by_factor.items():
        bars = [
            _bar(
                axis,
                each.estimate,
                label=f"{level_text(factor, each.of)} over {level_text(factor, each.over)}",
                notes=_contrast_notes(each),
                measure=measure,
                words=format_estimate(each.estimate, measure, each.lowest, each.highest),
            )
            for each in those
        ]
        groups.append((factor.name, tuple(bars)))
    return Bars(
        title=measure.title,
        unit=_unit(measure, by_ratio),
        zero=axis.at(0.0),
        ticks=axis.ticks(),
        groups=tuple(groups),
    )


def _contrast_notes(contrast: Contrast) -> tuple[str, ...]:
    pairs, cells = count(contrast.pairs, "pair"), count(contrast.cells, "setting")
    notes = [f"{regime_text(contrast.regime)}, {pairs} in {cells} of the rest"]
    if note := interval_note(contrast):
        notes.append(note)
    return (*notes, *(f"also ran differently: {text}" for text in contrast.also_changed))


def waterfall(split: Split) -> Bars | None:
    """Return the parts of a split, each beginning where the one before it ends, and their sum; None without parts."""
    if not split.parts or split.total is None:
        return None
    by_ratio = split.measure.ratios
    starts = [0.0]
    for part in split.parts:
        starts.append(starts[-1] + (part.estimate.value if part.estimate else 0.0))
    values = [start + end for start, part in zip(starts, split.parts, strict=False) for end in _part_ends(part)]
    reach = [*starts, *values, *_ends([split.total])]
    axis = _Axis(reach, 3 * max(map(abs, starts)) or 1.0, split.measure, by_ratio)
    bars = [
        _bar(
            axis,
            part.estimate or Estimate(value=0.0),
            label=part.factor,
            notes=_part_notes(part),
            measure=split.measure,
            start=start,
            words=None if part.estimate else "unchanged",
            part=True,
        )
        for start, part in zip(starts, split.parts, strict=False)
    ]
    bars.append(_bar(axis, split.total, label="all together", notes=(), measure=split.measure, part=True, total=True))
    return Bars(
        title=split.measure.title,
        unit=_unit(split.measure, by_ratio),
        zero=axis.at(0.0),
        ticks=axis.ticks(),
        groups=(("", tuple(bars)),),
    )


def _part_ends(part: FactorPart) -> list[float]:
    return _ends([part.estimate]) if part.estimate else [0.0]


def _part_notes(part: FactorPart) -> tuple[str, ...]:
    return (part.of,) if part.of == part.over else (f"{part.over} → {part.of}",)


def _bar(
    axis: _Axis,
    estimate: Estimate,
    *,
    label: str,
    notes: tuple[str, ...],
    measure: Measure,
    start: float = 0.0,
    words: str | None = None,
    part: bool = False,
    total: bool = False,
) -> Bar:
    low = start + (estimate.value if estimate.low is None else estimate.low)
    high = start + (estimate.value if estimate.high is None else estimate.high)
    return Bar(
        label=label,
        notes=notes,
        words=format_estimate(estimate, measure) if words is None else words,
        at=axis.at(start + estimate.value),
        low=axis.at(low),
        high=axis.at(high),
        start=axis.at(start),
        cut_low=low < axis.low,
        cut_high=high > axis.high,
        seen=estimate.seen,
        part=part,
        total=total,
    )


def _ends(estimates: Sequence[Estimate]) -> list[float]:
    return [end for each in estimates for end in (each.value, each.low, each.high) if end is not None]


def _most(estimates: Sequence[Estimate], measure: Measure) -> float:
    """Beyond this the axis is cut: an interval from two pairs can be a hundred times as wide as what it is about."""
    largest = max(abs(each.value) for each in estimates)
    least = math.log(1.2) if measure.ratios else 0.0
    return max(3 * largest, least) or 1.0


def _unit(measure: Measure, by_ratio: bool) -> str:
    if not measure.ratios:
        return measure.unit
    return "ratio, logarithmic axis" if by_ratio else "change in percent"
