"""The difference of one measure between two sides, over the points that both have, and how sure it is."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_lab.report.measures import ENERGY, THROUGHPUT, VRAM, Measure
from lora_lab.report.statistics.averages import average
from lora_lab.report.statistics.blocks import figures
from lora_lab.report.statistics.differences import Difference, Values, by_block, difference, unpaired, with_resolution
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.writing.labels import count
from lora_lab.store.trials import Trial

_ERRORS = {THROUGHPUT.name: "throughput/tokens_per_second_error", ENERGY.name: "energy/joules_per_token_error"}
"""What a trial says of its own figure's error, in the figure's unit: throughput half a 95 % interval over its steps,
energy a bound. docs/measurement.md has both."""

WITHIN_RUNS = "from the errors within the two runs only: variation between runs of the same settings is not included"
"""The basis of an interval that is too narrow: two runs of the same settings differ by more than their own errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedPoint:
    """One point on both sides."""

    label: str
    one: tuple[Trial, ...]
    other: tuple[Trial, ...]

    def having(self, measure: Measure) -> "MatchedPoint | None":
        """Return it with the trials that have this figure; None where a side has none."""
        one, other = (
            tuple(trial for trial in side if measure.of(trial) is not None) for side in (self.one, self.other)
        )
        return MatchedPoint(label=self.label, one=one, other=other) if one and other else None


def matched_difference(points: Sequence[MatchedPoint], measure: Measure) -> tuple[Estimate, str]:
    """Return `one` minus `other` averaged over the points, and what its interval is made of or why there is none.

    By pairs of one block where one sweep ran both sides; else unpaired, each point and side with its own noise, and by
    blocks where that is wider: a machine that is slow for a while makes a whole block slow, and more points don't
    average that out. Without repeats, over the points where there are several; for one, from the errors within both
    runs."""
    apart = _apart(points, measure)
    middle = statistics.median(value for each in points for trial in each.other if (value := measure.of(trial)))
    if len(points) == 1 and all(len(side) == 1 for side in (points[0].one, points[0].other)):
        found, basis = _within_runs(points[0], measure, apart[0].value)
    else:
        made = average(apart)
        found = made.estimate
        basis = found.why_no_interval or _basis(points, made.interval_over, apart[0].is_paired)
    return with_resolution(found, measure, middle), basis


def _apart(points: Sequence[MatchedPoint], measure: Measure) -> list[Difference]:
    """Return each point's difference: paired where all of them can be."""
    sides = [(_values(each.one, measure), _values(each.other, measure)) for each in points]
    made = [difference(*side) for side in sides]
    return made if len({each.is_paired for each in made}) == 1 else [unpaired(*side) for side in sides]


def _values(trials: Sequence[Trial], measure: Measure) -> Values:
    return by_block(figures(trials, measure))


def _basis(points: Sequence[MatchedPoint], interval_over: str, is_paired: bool) -> str:
    trials = sum(len(each.one) + len(each.other) for each in points)
    if interval_over == "settings":
        few = "no repeats" if trials == 2 * len(points) else "few repeats"
        return f"{few}: from how the difference varies over {len(points)} points"
    basis = f"over {count(trials, 'trial')} of {count(len(points), 'point')}"
    return basis + (", paired by block" if is_paired else "") + (", by blocks" if interval_over == "blocks" else "")


def _within_runs(point: MatchedPoint, measure: Measure, value: float) -> tuple[Estimate, str]:
    """Compare one trial on each side. Errors of throughput are independent, so their squares add up; those of energy
    are bounds, so they add up themselves."""
    [one], [other] = point.one, point.other
    key = _ERRORS.get(measure.name)
    known: list[float | None] = [trial.metrics.get(key) for trial in (one, other)] if key else []
    if measure == VRAM:
        known = [0.0, 0.0]  # read to a driver's page, which with_resolution() adds
    shares = [
        error / figure
        for error, trial in zip(known, (one, other), strict=False)
        if error is not None and (figure := measure.of(trial))
    ]
    if len(shares) < 2:
        why = "one trial each, and its own error is not known: repeat with repeats=5"
        return Estimate(value=value, why_no_interval=why), why
    reach = sum(shares) if measure == ENERGY else math.hypot(*shares)
    found = Estimate(value=value, low=value - reach, high=value + reach, detectable=None)
    return replace(found, detectable=2 * reach if measure == ENERGY else reach * _TO_DETECT), WITHIN_RUNS


_TO_DETECT = (1.959964 + 0.841621) / 1.959964
"""From half a 95 % interval to what is detected with 80 % power, for normal errors."""
