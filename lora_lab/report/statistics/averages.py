"""The average of a difference over settings of everything else, and how sure it is where noise is unequal."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lora_lab.report.statistics.blocks import Block
from lora_lab.report.statistics.differences import Difference, Values, pooled_noise
from lora_lab.report.statistics.estimates import ROUNDING, Estimate, estimate, estimate_of_sum, wider

Matrix = NDArray[np.float64]

_BLOCKS_DIFFER = 0.05
"""Below this p the blocks' own differences count as noise, too."""
_FEWEST_BLOCKS = 3
_FEWEST_UNPAIRED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """The mean of the settings' differences."""

    estimate: Estimate
    interval_over: str
    """What the interval counts as noise: "repeats", "settings", "blocks", or "nothing" (no interval)."""
    by_blocks: Estimate | None
    """The same value with the interval over blocks; None where there are too few."""


def average(settings: Sequence[Difference]) -> Average:
    """Return the mean of the settings' differences, with an interval over repeats where there are enough of them.

    Over repeats, each setting has its own noise where each has two pairs or more (Welch's standard error,
    Satterthwaite's degrees of freedom). Where a setting has one, its noise is seen nowhere but in how far it lies from
    the others: then the wider counts of two intervals, of the variance pooled within settings and of the spread over
    them. Where blocks differ beyond noise (`_blocks_differ`), the interval over blocks counts if it is wider; unpaired,
    it always does, because a slow block is then in the difference as a whole."""
    value = statistics.fmean(each.value for each in settings)
    found, over = _over_repeats_or_settings(value, settings)
    by_blocks = _by_blocks(value, settings)
    always = not settings[0].is_paired
    if (
        by_blocks is not None
        and wider(found, by_blocks) is by_blocks
        and (always or _blocks_differ([each.samples[0] for each in settings]))
    ):
        return Average(estimate=by_blocks, interval_over="blocks", by_blocks=by_blocks)
    return Average(estimate=found, interval_over=over, by_blocks=by_blocks)


def _over_repeats_or_settings(value: float, settings: Sequence[Difference]) -> tuple[Estimate, str]:
    noise, count = pooled_noise(sample for each in settings for sample in each.samples), len(settings)
    if count == 1 and noise is None:
        why = "there is one pair of trials: run the sweep with repeats=3"
        return Estimate(value=value, why_no_interval=why), "nothing"
    variances = [each.variances for each in settings]
    if all(variances):
        return estimate_of_sum(value, [(v / count**2, df) for each in variances for v, df in each]), "repeats"
    over_repeats = []
    if noise is not None:
        error_scale = math.fsum(each.error_scale for each in settings) / count**2
        over_repeats = [estimate(value, math.sqrt(noise.variance * error_scale), noise.df)]
    if count == 1:
        return over_repeats[0], "repeats"
    spread = estimate(value, statistics.stdev(each.value for each in settings) / math.sqrt(count), count - 1)
    found = wider(spread, *over_repeats)
    return found, "settings" if found is spread else "repeats"


def _by_blocks(value: float, settings: Sequence[Difference]) -> Estimate | None:
    """Return the interval that holds whatever a block does to the difference in all its settings: Student's over the
    blocks' means, each sweep of pairs by itself, and each side by itself, with the weight that it has in the average.

    None with one setting, whose interval over repeats is this one, and where there are too few blocks."""
    is_paired = settings[0].is_paired
    if len(settings) < 2:
        return None
    shares = []
    for side in zip(*(each.samples for each in settings), strict=True):
        of_block = _of_block(side)
        if not is_paired and any(not sweep for sweep, _ in of_block):
            return None  # lone trials ran in no block
        sweeps: dict[str, list[Block]] = {}
        for block in of_block:
            sweeps.setdefault(block[0] if is_paired else "all", []).append(block)
        if any(len(blocks) < (_FEWEST_BLOCKS if is_paired else _FEWEST_UNPAIRED) for blocks in sweeps.values()):
            return None
        for blocks in sweeps.values():
            weight = math.fsum(len(each.keys() & set(blocks)) / len(each) for each in side) / len(side)
            variance = statistics.variance(of_block[block] for block in blocks) / len(blocks)
            shares.append((weight**2 * variance, len(blocks) - 1))
    return estimate_of_sum(value, shares)


def _of_block(side: Sequence[Values]) -> dict[Block, float]:
    """Return each block's mean, adjusted for the settings that it lacks (least squares, value ~ setting + block).

    Settings are centred first, so that blocks that share none stand about the same level."""
    means = [statistics.fmean(each.values()) for each in side]
    centred = [{block: value - mean for block, value in each.items()} for each, mean in zip(side, means, strict=True)]
    values, of_settings, of_blocks = _columns(centred)
    coefficients = np.linalg.lstsq(np.hstack([of_settings, of_blocks]), values, rcond=None)[0]
    return dict(zip(_blocks(side), map(float, coefficients[len(side) :]), strict=True))


def _blocks_differ(side: Sequence[Values]) -> bool:
    """Return whether blocks explain more of the spread about the settings' means than noise would (F test of blocks in
    value ~ setting + block, p < 0.05)."""
    values, of_settings, of_blocks = _columns(side)
    total, rank_of_settings = _left_over(of_settings, values)
    within, rank = _left_over(np.hstack([of_settings, of_blocks]), values)
    df, df_of_blocks = len(values) - rank, rank - rank_of_settings
    if not df or not df_of_blocks:
        return False
    least = df * ROUNDING**2
    between, within = (squares if squares > least else 0.0 for squares in (total - within, within))
    if not within:
        return between > 0
    return float(stats.f.sf(between / df_of_blocks / (within / df), df_of_blocks, df)) < _BLOCKS_DIFFER


def _left_over(columns: Matrix, values: Matrix) -> tuple[float, int]:
    """Return the squares that the columns leave unexplained, and the columns' rank."""
    coefficients, _, rank, _ = np.linalg.lstsq(columns, values, rcond=None)
    return float(np.sum((values - columns @ coefficients) ** 2)), int(rank)


def _columns(side: Sequence[Values]) -> tuple[Matrix, Matrix, Matrix]:
    """Return the values, and indicators of their settings and of their blocks."""
    rows = [(number, block, value) for number, each in enumerate(side) for block, value in sorted(each.items())]
    of_settings = np.array([[number == other for other in range(len(side))] for number, _, _ in rows], dtype=float)
    of_blocks = np.array([[block == other for other in _blocks(side)] for _, block, _ in rows], dtype=float)
    return np.array([value for _, _, value in rows]), of_settings, of_blocks


def _blocks(side: Sequence[Values]) -> list[Block]:
    return sorted({block for each in side for block in each})
