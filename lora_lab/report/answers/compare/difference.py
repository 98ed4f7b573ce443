"""The difference of one measure between two sides, over the points that both have, and how sure it is."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_lab.report.measures import ENERGY, THROUGHPUT, VRAM, Measure
from lora_lab.report.statistics.estimates import Estimate, estimate
from lora_lab.report.statistics.resolution import no_finer
from lora_lab.report.writing.labels import count
from lora_lab.store.trials import Trial

_ERRORS = {THROUGHPUT.name: "throughput/tokens_per_second_error", ENERGY.name: "energy/joules_per_token_error"}
"""What a trial says of its own figure's error, in the figure's unit: throughput half a 95 % interval over its steps,
energy a bound. docs/measurement.md has both."""

WITHIN_RUNS = "from the errors within the two runs alone: how runs of the same settings differ is not in it"
"""The basis of an interval that is too narrow: two runs of the same settings differ by more than their own errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One point on both sides."""

    label: str
    one: tuple[Trial, ...]
    other: tuple[Trial, ...]

    def having(self, measure: Measure) -> "Pair | None":
        """With the trials that have this figure; None where a side has none."""
        one, other = (tuple(trial for trial in side if _has(trial, measure)) for side in (self.one, self.other))
        return Pair(label=self.label, one=one, other=other) if one and other else None


def difference(pairs: Sequence[Pair], measure: Measure) -> tuple[Estimate, str]:
    """Of one less the other, the mean over the points, and what its interval is made of or why there is none.

    With repeats, the wider of two intervals: over single trials, by the variance within points (pooled; degrees of
    freedom are the trials beyond the first of each point and side), and over blocks (one repeat of all points of a
    sweep), because a machine that is slow for a while makes a whole block slow, and more points don't average that
    out. Without repeats, over the points where there are several; for one point, from the errors within both runs."""
    apart = [_mean(pair.one, measure) - _mean(pair.other, measure) for pair in pairs]
    value = float(np.mean(apart))
    middle = float(np.median([measure.of(trial) or 0.0 for pair in pairs for trial in pair.other]))
    df = sum(len(side) - 1 for pair in pairs for side in (pair.one, pair.other))
    if df > 0:
        found, basis = _over_repeats(pairs, measure, value, df)
    elif len(pairs) > 1:
        error = float(np.std(apart, ddof=1)) / math.sqrt(len(pairs))
        found = estimate(value, error, len(pairs) - 1)
        basis = f"no repeats: from how the difference varies over {len(pairs)} points"
    else:
        found, basis = _within_runs(pairs[0], measure, value)
    return no_finer(found, measure, middle), basis


def _over_repeats(pairs: Sequence[Pair], measure: Measure, value: float, df: int) -> tuple[Estimate, str]:
    squares = sum(_squares(side, measure) for pair in pairs for side in (pair.one, pair.other))
    weights = sum(1 / len(side) for pair in pairs for side in (pair.one, pair.other))
    error = math.sqrt(squares / df * weights) / len(pairs)
    trials = sum(len(pair.one) + len(pair.other) for pair in pairs)
    by_trial = estimate(value, error, df)
    basis = f"over {count(trials, 'trial')} of {count(len(pairs), 'point')}"
    by_block = _over_blocks(pairs, measure, value)
    if by_block is None or _width(by_block) <= _width(by_trial):
        return by_trial, basis
    return by_block, f"{basis}, by blocks"


def _over_blocks(pairs: Sequence[Pair], measure: Measure, value: float) -> Estimate | None:
    """The same by the means of blocks; None where a side has less than two of them, or there is but one point, whose
    blocks are its trials."""
    if len(pairs) < 2:
        return None
    parts = []
    for sides in ([pair.one for pair in pairs], [pair.other for pair in pairs]):
        blocks: dict[tuple[str, int], list[float]] = defaultdict(list)
        for side in sides:
            if len(side) > 1 and all(trial.sweep is not None for trial in side):
                mean = _mean(side, measure)
                for trial in side:
                    blocks[trial.sweep or "", trial.repeat].append(_figure(trial, measure) - mean)
        if len(blocks) < 2:
            return None
        # a block stands for as many trials as it has; in a whole sweep all are alike
        means, sizes = np.array([np.mean(b) for b in blocks.values()]), np.array([len(b) for b in blocks.values()])
        variance = float(np.sum(sizes * means**2) / np.mean(sizes) / (len(blocks) - 1))
        parts.append((variance / len(blocks), len(blocks) - 1))
    total = sum(part for part, _ in parts)
    if total == 0:
        return None
    df = total**2 / sum(part**2 / df for part, df in parts)
    return estimate(value, math.sqrt(total), df)


def _within_runs(pair: Pair, measure: Measure, value: float) -> tuple[Estimate, str]:
    """One trial on each side. Errors of throughput are independent, so their squares add up; those of energy are
    bounds, so they add up themselves."""
    [one], [other] = pair.one, pair.other
    key = _ERRORS.get(measure.name)
    known: list[float | None] = [trial.metrics.get(key) for trial in (one, other)] if key else []
    if measure == VRAM:
        known = [0.0, 0.0]  # read to a driver's page, which no_finer() adds
    shares = [
        error / figure
        for error, trial in zip(known, (one, other), strict=False)
        if error is not None and (figure := measure.of(trial))
    ]
    if len(shares) < 2:
        why = "one trial each, and no error of its own is known: repeat with repeats=3"
        return Estimate(value=value, why_no_interval=why), why
    reach = sum(shares) if measure == ENERGY else math.hypot(*shares)
    found = Estimate(value=value, low=value - reach, high=value + reach, detectable=None)
    return replace(found, detectable=2 * reach if measure == ENERGY else reach * _TO_DETECT), WITHIN_RUNS


_TO_DETECT = (1.959964 + 0.841621) / 1.959964
"""From half a 95 % interval to what is seen four times in five, for normal errors."""


def _has(trial: Trial, measure: Measure) -> bool:
    value = measure.of(trial)
    return value is not None and math.isfinite(value)


def _figure(trial: Trial, measure: Measure) -> float:
    value = measure.of(trial)
    assert value is not None, "having() left it out"
    return math.log(value) if measure.ratios else value


def _mean(trials: Sequence[Trial], measure: Measure) -> float:
    return float(np.mean([_figure(trial, measure) for trial in trials]))


def _squares(trials: Sequence[Trial], measure: Measure) -> float:
    """Sum of squares about their mean."""
    return float(np.var([_figure(trial, measure) for trial in trials]) * len(trials))


def _width(found: Estimate) -> float:
    return (found.high or 0.0) - (found.low or 0.0)
