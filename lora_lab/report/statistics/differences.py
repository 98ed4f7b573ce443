"""Differences between A and B in one setting of everything else, with their uncertainty.

Contrasts, best, compare and claims all take their estimates from here; averages.py has the mean over several settings.

- Both sides have figures of two blocks or more in common: pairs by block, because what slows a whole block cancels out.
- Else, with repeats on both sides: unpaired, each side with its own variance (Welch 1947, The Generalization of
  Student's Problem when Several Different Population Variances are Involved).
- Else, with a single trial on a side: by the noise pooled over everything that has repeats, assumed to be equal in all.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lora_lab.report.measures import VRAM, Measure
from lora_lab.report.statistics.blocks import Block, TrialFigure
from lora_lab.report.statistics.estimates import Estimate, estimate, estimate_of_sum, variance

Values = Mapping[Block, float]
"""Figures, or differences of pairs, by block."""

ONE_EACH = "one trial each"
ONE_PAIR = "one pair of trials"

_PIECE_GIB = 2 / 1024
"""The driver hands out a card's memory in pieces of 2 MiB."""
_ROUNDING = 1e-9
"""What summing in another order can change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The variance of a single figure, pooled."""

    variance: float
    df: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One side minus the other."""

    value: float
    samples: tuple[Values, ...]
    """The independent samples whose means make the value: one of pairs' differences, or each side's figures."""

    @property
    def is_paired(self) -> bool:
        """Return whether it is paired."""
        return len(self.samples) == 1

    @property
    def variances(self) -> list[tuple[float, int]]:
        """Return the variances of the samples' means, each with its degrees of freedom; empty where a sample has one
        figure only."""
        sizes = [len(sample) for sample in self.samples]
        if min(sizes) < 2:
            return []
        return [(variance(sample.values()) / len(sample), len(sample) - 1) for sample in self.samples]

    @property
    def error_scale(self) -> float:
        """Return the square of the standard error in units of a single figure's variance."""
        return math.fsum(1 / len(sample) for sample in self.samples)

    def estimate(self, noise: Noise | None = None, among: int = 1) -> Estimate:
        """Return the value with its interval.

        Args:
            noise: counts where a side has a single figure.
            among: number of intervals that together hold with 95 % (Bonferroni)."""
        if self.variances:
            return estimate_of_sum(self.value, self.variances, among)
        if noise is not None:
            return estimate(self.value, math.sqrt(noise.variance * self.error_scale), noise.df, among)
        return Estimate(value=self.value, why_no_interval=ONE_PAIR if self.is_paired else ONE_EACH)

    def is_seen(self, noise: Noise | None, among: int) -> bool:
        """Return whether there is a difference, where `among` such statements together hold with 95 % (Bonferroni).

        By its own noise or by the pooled noise of single figures, each at half the level: few repeats say too little of
        their own noise for many statements, and the pooled one is too coarse for pairs that agree closely."""
        if self.estimate(among=2 * among).seen:
            return True
        if noise is None:
            return False
        scale = 2 * self.error_scale if self.is_paired else self.error_scale  # a pair's difference has two figures
        return estimate(self.value, math.sqrt(noise.variance * scale), noise.df, 2 * among).seen is True

    def basis(self, noise: Noise | None = None) -> str:
        """Say what the interval is made of; "" without one."""
        if self.is_paired:
            return f"paired over {len(self.samples[0])} blocks"
        sizes = " against ".join(str(len(sample)) for sample in self.samples)
        if self.variances:
            return f"{sizes} trials, unpaired"
        return f"{sizes} trials, with the noise of all repeated ones" if noise is not None else ""


def by_block(figures: Iterable[TrialFigure]) -> dict[Block, float]:
    """Return the figures by block; a block that holds a point twice counts once, with the mean."""
    found: dict[Block, list[float]] = {}
    for figure in figures:
        found.setdefault(figure.block, []).append(figure.value)
    return {block: statistics.fmean(values) for block, values in sorted(found.items())}


def paired(of: Values, over: Values) -> Difference | None:
    """Return the mean difference of the blocks that both sides have; None without any.

    Trials of no sweep pair in their order."""
    pairs = {block: of[block] - over[block] for block in of if block in over}
    return Difference(value=statistics.fmean(pairs.values()), samples=(pairs,)) if pairs else None


def unpaired(of: Values, over: Values) -> Difference:
    """Return the difference of the sides' means."""
    return Difference(value=statistics.fmean(of.values()) - statistics.fmean(over.values()), samples=(of, over))


def difference(of: Values, over: Values) -> Difference:
    """Return the difference, paired by block where two or more are shared.

    One shared block is used where a side has nothing else; with repeats on both sides, these say more. The order of
    trials of no sweep says nothing of whether they ran close together, so they are not paired."""
    shared = [block for block in of if block in over and block[0]]
    if len(shared) == 1 and min(len(of), len(over)) > 1:
        shared = []
    if shared:
        of, over = ({block: side[block] for block in shared} for side in (of, over))
    return (paired(of, over) if len(shared) > 1 else None) or unpaired(of, over)


def pooled_noise(samples: Iterable[Values]) -> Noise | None:
    """Return the variance within samples; None where none has repeats."""
    repeated = [list(sample.values()) for sample in samples if len(sample) > 1]
    df = sum(len(sample) - 1 for sample in repeated)
    squares = math.fsum(variance(sample) * (len(sample) - 1) for sample in repeated)
    return Noise(variance=squares / df, df=df) if df else None


def with_resolution(found: Estimate, measure: Measure, value: float) -> Estimate:
    """Return the estimate with an interval no narrower than the measure resolves at figures of about `value`.

    Otherwise every difference would count between repeats that agree to the last digit, as VRAM's do."""
    if found.low is None or found.high is None:
        return found
    least = _ROUNDING * (1.0 if measure.ratios else abs(value))
    if measure == VRAM:
        least = _PIECE_GIB / value
    return replace(
        found,
        low=min(found.low, found.value - least),
        high=max(found.high, found.value + least),
        detectable=None if found.detectable is None else max(found.detectable, least),
    )
