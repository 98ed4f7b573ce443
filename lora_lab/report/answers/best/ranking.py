"""Which of several candidates is best by one measure, and how far the others are from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_lab.report.answers.best.candidates import Candidate
from lora_lab.report.measures import Better, Measure
from lora_lab.report.statistics.estimates import ROUNDING, Estimate, estimate
from lora_lab.report.statistics.resolution import no_finer

ONE_EACH = "one trial each"

_Block = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A candidate that is not the best, beside the best."""

    candidate: Candidate
    estimate: Estimate
    """Its figure over the best one's: a difference of logarithms for ratios, else plain."""
    how: str
    """What the interval is made of; "" without one."""
    ahead: bool
    """Whether it looks better than what was chosen: from a single trial, or (seldom) because blocks that only some
    share make each of several look better than the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    candidate: Candidate
    blocks: Mapping[_Block, float]
    """Its figures on the measure's scale, by repeat of a sweep. A trial of no sweep is a block of its own."""
    mean: float

    @property
    def repeated(self) -> bool:
        return len(self.blocks) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Noise:
    """Of single trials, over all candidates that have repeats."""

    variance: float
    df: int


def ranked(candidates: Sequence[Candidate], measure: Measure) -> tuple[Candidate, tuple[RunnerUp, ...]]:
    """The best, and the others beside it.

    The best is the one than which none is better by the estimates shown, which are paired by block: a median over
    other blocks than the next one's says as much of the blocks. A single trial wins only where it can be told from the
    candidates with repeats, by the noise of those: of many single trials the luckiest looks best (the winner's curse;
    Efron 2011, "Tweedie's formula and selection bias")."""
    told = [_told(one, measure) for one in sorted(candidates, key=_order(measure))]
    noise = _noise(told)
    best = _unbeaten(told, measure)
    if not best.repeated:
        safer = [one for one in told if one.repeated and not _beside(best, one, noise, measure).estimate.seen]
        best = _unbeaten(safer, measure) if safer else best
    beside = [_beside(best, other, noise, measure) for other in told if other is not best]
    gain = _sign(measure)
    return best.candidate, tuple(sorted(beside, key=lambda runner: -gain * runner.estimate.value))


def _order(measure: Measure) -> Callable[[Candidate], tuple[float, float, str]]:
    sign = _sign(measure)
    return lambda one: (-sign * one.figures[measure.name].median, one.needs_gib or math.inf, one.label)


def _sign(measure: Measure) -> float:
    return 1.0 if measure.better is Better.higher else -1.0


def _told(candidate: Candidate, measure: Measure) -> _Told:
    blocks: dict[_Block, float] = {}
    for trial in candidate.trials:
        value = measure.of(trial)
        if value is not None:
            block = (trial.run_id, -1) if trial.sweep is None else (trial.sweep, trial.repeat)
            blocks[block] = math.log(value) if measure.ratios else value
    return _Told(candidate=candidate, blocks=blocks, mean=math.fsum(blocks.values()) / len(blocks))


def _noise(told: Sequence[_Told]) -> _Noise | None:
    df = sum(len(one.blocks) - 1 for one in told)
    squares = sum((value - one.mean) ** 2 for one in told for value in one.blocks.values())
    return _Noise(variance=squares / df, df=df) if df else None


def _unbeaten(told: Sequence[_Told], measure: Measure) -> _Told:
    """From the best by median on to whichever is furthest ahead, till none is. Where that goes round in a circle: the
    one of the circle that fewest are ahead of."""
    sign, passed = _sign(measure), [told[0]]
    while True:
        gains = [sign * _apart(passed[-1], other) for other in told]
        most = int(np.argmax(gains))
        if gains[most] <= ROUNDING:
            return passed[-1]
        if any(told[most] is one for one in passed):
            return min(passed, key=lambda one: sum(sign * _apart(one, other) > ROUNDING for other in told))
        passed.append(told[most])


def _shared(one: _Told, other: _Told) -> list[_Block]:
    """Blocks to pair by: none where there is only one, and repeats elsewhere say more."""
    shared = [block for block in one.blocks if block in other.blocks]
    return [] if len(shared) == 1 and one.repeated and other.repeated else shared


def _apart(best: _Told, other: _Told) -> float:
    """The other less the best."""
    if best is other:
        return 0.0
    shared = _shared(best, other)
    if shared:
        return math.fsum(other.blocks[block] - best.blocks[block] for block in shared) / len(shared)
    return other.mean - best.mean


def _beside(best: _Told, other: _Told, noise: _Noise | None, measure: Measure) -> RunnerUp:
    """With Student's interval: paired by block where they share two or more; else unpaired with variances of their own
    (Welch); with a single trial on either side by the noise of all candidates that have repeats, which is taken to be
    alike in all."""
    value, shared = _apart(best, other), _shared(best, other)
    sizes = len(best.blocks), len(other.blocks)
    if len(shared) >= 2:
        apart = [other.blocks[block] - best.blocks[block] for block in shared]
        found = estimate(value, float(np.std(apart, ddof=1)) / math.sqrt(len(shared)), len(shared) - 1)
        how = f"paired over {len(shared)} blocks"
    elif min(sizes) > 1:
        found = estimate(value, *_welch(list(best.blocks.values()), list(other.blocks.values())))
        how = f"{sizes[0]} against {sizes[1]} trials, unpaired"
    elif noise is not None:
        taken = (1, 1) if shared else sizes
        found = estimate(value, math.sqrt(noise.variance * sum(1 / size for size in taken)), noise.df)
        how = f"{sizes[0]} against {sizes[1]} trials, by the noise of all that have repeats"
    else:
        found, how = Estimate(value=value, why_no_interval=ONE_EACH), ""
    found = no_finer(found, measure, best.candidate.figures[measure.name].median)
    ahead = _sign(measure) * value > ROUNDING
    return RunnerUp(candidate=other.candidate, estimate=found, how=how, ahead=ahead)


def _welch(one: Sequence[float], two: Sequence[float]) -> tuple[float, float]:
    """Standard error of the difference of two means, and its degrees of freedom (Welch, Satterthwaite), rounded down to
    tenths: the quantiles of each number of them are looked for once."""
    parts = [float(np.var(sample, ddof=1)) / len(sample) for sample in (one, two)]
    total = sum(parts)
    if total == 0:
        return 0.0, float(len(one) + len(two) - 2)
    df = total**2 / sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, (one, two), strict=True))
    return math.sqrt(total), max(1.0, math.floor(10 * df) / 10)
