"""One factor's effect at each setting of the rest by itself.

An average over a grid hides what happens at one setting, and a claim of "up to" is about one. So each cell (one setting
of everything else) gets an interval of its own, from its own repeats only: no cell borrows the noise of another.
"""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from lora_lab.report.answers.claims.study import ContrastClaim, Study
from lora_lab.report.measures import Measure
from lora_lab.report.statistics.blocks import Block, Figure, figures, regime_between, settings_besides
from lora_lab.report.statistics.estimates import CONFIDENCE, Estimate
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The pairs of trials at one setting of everything but the claim's factor."""

    trials: tuple[Trial, ...]
    regime: str
    """As contrasts have it."""
    differences: tuple[float, ...]
    """`of` less `over`, a pair each; of logarithms for measures that are compared by ratios."""
    ends: tuple[str, ...]
    """The study's runs that were set so, but for the claim's factor: the claim's own settings."""

    @property
    def repeated(self) -> bool:
        """Whether it has an interval."""
        return len(self.differences) > 1

    def estimate(self, among: int = 1) -> Estimate:
        """The mean difference with Student's interval; of `among` cells all intervals hold together with 95 %
        (Bonferroni)."""
        value = statistics.fmean(self.differences)
        if not self.repeated:
            return Estimate(value=value, why_no_interval="one pair of trials")
        df = len(self.differences) - 1
        reach = _quantile(df, among) * statistics.stdev(self.differences) / math.sqrt(df + 1)
        return Estimate(value=value, low=value - reach, high=value + reach)


@functools.cache
def _quantile(df: int, among: int) -> float:
    return float(stats.t.isf((1 - CONFIDENCE) / 2 / among, df))


def factor_of(claim: ContrastClaim) -> Factor:
    """The claim's factor alone. Pairs have all else equal, so they need no rank: what a stray trial ties together in
    the whole design does not matter to them."""
    return Factor(name=claim.factor, keys=(claim.factor,), levels=(claim.over, claim.of))


def cells_of(study: Study, claim: ContrastClaim, sides: Sequence[Trial], measure: Measure) -> list[Cell]:
    """The cells in which a block (the same repeat of the same sweep) holds both levels."""
    found = figures(sides, measure)
    factor = factor_of(claim)
    by_setting: dict[tuple[str, ...], list[Figure]] = {}
    for figure, setting in zip(found, settings_besides([each.trial for each in found], [factor]), strict=True):
        by_setting.setdefault(setting, []).append(figure)
    return [made for _, inside in sorted(by_setting.items()) if (made := _cell(study, claim, factor, inside))]


def _cell(study: Study, claim: ContrastClaim, factor: Factor, inside: Sequence[Figure]) -> Cell | None:
    sides: dict[str, dict[Block, list[Figure]]] = {level: {} for level in factor.levels}
    for figure in inside:
        sides[factor.level(figure.trial)].setdefault(figure.block, []).append(figure)
    over, of = (sides[level] for level in factor.levels)
    blocks = sorted(over.keys() & of.keys())
    if not blocks:
        return None
    before, after = ([figure.trial for block in blocks for figure in side[block]] for side in (over, of))
    trials = (*before, *after)
    return Cell(
        trials=trials,
        regime=regime_between(before, after),
        differences=tuple(_mean(of[block]) - _mean(over[block]) for block in blocks),
        ends=tuple(run for run in claim.ends if _set_as(trials[0].params, study.settings(run), claim.factor)),
    )


def _mean(same: Sequence[Figure]) -> float:
    return statistics.fmean(figure.value for figure in same)


def _set_as(params: Mapping[str, str], settings: Mapping[str, str], but: str) -> bool:
    return all(params.get(key) == value for key, value in settings.items() if key != but)
