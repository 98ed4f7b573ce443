"""Which of several candidates is best by one measure, and how far the others are from it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lora_lab.report.answers.best.candidates import Candidate
from lora_lab.report.measures import LOSS, Better, Measure
from lora_lab.report.statistics.blocks import figures
from lora_lab.report.statistics.differences import (
    Noise,
    Values,
    by_block,
    difference,
    pooled_noise,
    with_resolution,
)
from lora_lab.report.statistics.estimates import ROUNDING, Estimate
from lora_lab.report.statistics.heldout import loss_over

OVER_ROWS = "the held-out rows of single trials"
"""What the interval of a loss is made of where nothing was repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A candidate that is not the best, compared with the best."""

    candidate: Candidate
    estimate: Estimate
    """Its figure over the best one's: a difference of logarithms for ratios, else plain."""
    how: str
    """What the interval is made of; "" without one."""
    ahead: bool
    """Whether it looks better than what was chosen: from a single trial, or (seldom) because blocks that only some
    share make each of several look better than the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rated:
    candidate: Candidate
    values: Values
    """Its figures on the measure's scale."""

    @property
    def repeated(self) -> bool:
        return len(self.values) > 1


def ranked(candidates: Sequence[Candidate], measure: Measure) -> tuple[Candidate, tuple[RunnerUp, ...]]:
    """Return the best, and the others compared with it.

    No candidate is better than the best by the estimates shown. They are paired by block, because medians over
    different blocks also differ by the blocks. A single trial wins only if it differs significantly from the
    candidates with repeats, by their noise: of many single trials the luckiest looks best (the winner's curse;
    Efron 2011, "Tweedie's formula and selection bias")."""
    rated = _rated(sorted(candidates, key=_order(measure)), measure)
    noise = pooled_noise(one.values for one in rated)
    best = _unbeaten(rated, measure)
    if not best.repeated:
        safer = [one for one in rated if one.repeated and not _runner_up(best, one, noise, measure).estimate.seen]
        best = _unbeaten(safer, measure) if safer else best
    others = [_runner_up(best, other, noise, measure) for other in rated if other is not best]
    gain = _sign(measure)
    return best.candidate, tuple(sorted(others, key=lambda runner: -gain * runner.estimate.value))


def _order(measure: Measure) -> Callable[[Candidate], tuple[float, float, str]]:
    sign = _sign(measure)
    return lambda one: (-sign * one.figures[measure.name].median, one.needs_gib or math.inf, one.label)


def _sign(measure: Measure) -> float:
    return 1.0 if measure.better is Better.higher else -1.0


def _rated(candidates: Sequence[Candidate], measure: Measure) -> list[_Rated]:
    """Return each with its figures; blocks are numbered over all of them."""
    found = {each.trial.run_id: each for each in figures([t for one in candidates for t in one.trials], measure)}
    return [
        _Rated(candidate=one, values=by_block(found[t.run_id] for t in one.trials if t.run_id in found))
        for one in candidates
    ]


def _unbeaten(rated: Sequence[_Rated], measure: Measure) -> _Rated:
    """Start at the best median and move to whichever is furthest ahead, until none is ahead.

    In a cycle, return the member that the fewest others are ahead of."""
    sign, passed = _sign(measure), [rated[0]]
    while True:
        gains = [sign * _apart(passed[-1], other) for other in rated]
        most = int(np.argmax(gains))
        if gains[most] <= ROUNDING:
            return passed[-1]
        if any(rated[most] is one for one in passed):
            return min(passed, key=lambda one: sum(sign * _apart(one, other) > ROUNDING for other in rated))
        passed.append(rated[most])


def _apart(best: _Rated, other: _Rated) -> float:
    """Return how far the other lies from the best."""
    return 0.0 if best is other else difference(other.values, best.values).value


def _runner_up(best: _Rated, other: _Rated, noise: Noise | None, measure: Measure) -> RunnerUp:
    apart = difference(other.values, best.values)
    found = with_resolution(apart.estimate(noise), measure, best.candidate.figures[measure.name].median)
    how = apart.basis(noise)
    if measure is LOSS and found.seen is None:
        rows = loss_over(other.candidate.trials, best.candidate.trials)
        if rows is not None and rows.low is not None:
            found, how = Estimate(value=apart.value, low=rows.low, high=rows.high), OVER_ROWS
    return RunnerUp(
        candidate=other.candidate,
        estimate=found,
        how=how,
        ahead=_sign(measure) * apart.value > ROUNDING,
    )
