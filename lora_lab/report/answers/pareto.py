"""Points as medians over their trials, and which of them nothing else beats."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_lab.report.measures import KNOWN, Better, Measure
from lora_lab.report.statistics.blocks import regime_of
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.naming import in_order, word
from lora_lab.store.trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One combination of levels with its trials."""

    levels: Mapping[str, str]
    """By factor name."""
    trials: tuple[Trial, ...]
    figures: Mapping[str, tuple[float, float, float]]
    """Median, lowest and highest of its measured trials, by measure name; a measure that none has is not there."""
    outcomes: Mapping[str, int]
    """How many trials ended how."""
    regime: str
    """Of its measured trials."""

    @property
    def label(self) -> str:
        """Return the point's name."""
        return " ".join(word(name, self.levels[name]) for name in in_order(self.levels)) or "the only point"


def points(trials: Sequence[Trial], measured: Sequence[Trial], factors: Sequence[Factor]) -> list[Point]:
    """Group trials by their levels, in the order of the levels. Figures are those of `measured`, outcomes those of
    all."""
    found: dict[tuple[str, ...], list[Trial]] = {}
    for trial in trials:
        found.setdefault(tuple(factor.level(trial) for factor in factors), []).append(trial)
    comparable = {trial.run_id for trial in measured}

    def place(levels: tuple[str, ...]) -> list[int]:
        return [factor.levels.index(level) for factor, level in zip(factors, levels, strict=True)]

    names = [factor.name for factor in factors]
    made = []
    for levels in sorted(found, key=place):
        told = [trial for trial in found[levels] if trial.run_id in comparable]
        made.append(
            Point(
                levels=dict(zip(names, levels, strict=True)),
                trials=tuple(found[levels]),
                figures=_figures(told),
                outcomes=dict(Counter(trial.outcome for trial in found[levels])),
                regime=regime_of(told),
            )
        )
    return made


def front(candidates: Sequence[Point], one: Measure, other: Measure) -> list[Point]:
    """Return the points that none beats in one measure without losing in the other, best in the first measure first.

    By their medians; points without one of the two figures are left out, equal ones are kept together."""
    goods = {
        id(point): (_good(point, one), _good(point, other))
        for point in candidates
        if one.name in point.figures and other.name in point.figures
    }
    there = [point for point in candidates if id(point) in goods]
    kept = [point for point in there if not any(_beats(goods[id(rival)], goods[id(point)]) for rival in there)]
    return sorted(kept, key=lambda point: (-goods[id(point)][0], point.label))


def _figures(measured: Sequence[Trial]) -> dict[str, tuple[float, float, float]]:
    found = {measure.name: [measure.of(trial) for trial in measured] for measure in KNOWN}
    told = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: (statistics.median(values), min(values), max(values)) for name, values in told.items() if values}


def _good(point: Point, measure: Measure) -> float:
    """Return its median, with the sign changed if lower is better."""
    median = point.figures[measure.name][0]
    return median if measure.better is Better.higher else -median


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]
