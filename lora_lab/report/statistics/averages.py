"""The average of a difference over settings of everything else, and how sure it is where noise is unequal."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_lab.report.statistics.blocks import Block
from lora_lab.report.statistics.differences import Difference, Values, pooled_noise
from lora_lab.report.statistics.estimates import Estimate, estimate, estimate_of_sum, variance, wider

Matrix = NDArray[np.float64]

_FEWEST_BLOCKS = 3
_FEWEST_UNPAIRED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """The mean of the settings' differences, with two intervals."""

    this_session: Estimate
    """With the interval over repeats: how far the mean would move if this session's trials were drawn again. It takes
    what a block does to the difference for noise of single trials."""
    sessions_like_it: Estimate | None
    """With the interval that also holds for other sessions on this machine: the wider of this session's and the one
    over blocks. None where there are too few blocks."""
    by_blocks: Estimate | None
    """With the interval over blocks alone; None with one setting, whose interval over repeats is this one."""
    session_over: str
    """What this session's interval counts as noise: "repeats", "settings", or "nothing" (no interval)."""

    @property
    def estimate(self) -> Estimate:
        """Return the headline: the interval that holds for sessions like it, where there are enough blocks."""
        return self.this_session if self.sessions_like_it is None else self.sessions_like_it

    @property
    def interval_over(self) -> str:
        """Return what the headline's interval counts as noise: "repeats", "settings", "blocks", or "nothing"."""
        headline = self.estimate
        return "blocks" if headline is self.by_blocks else self.session_over


def average(settings: Sequence[Difference]) -> Average:
    """Return the mean of the settings' differences, with an interval for this session and one for sessions like it.

    This session's is over repeats. Each setting has its own noise where each has two pairs or more (Welch's standard
    error, Satterthwaite's degrees of freedom). Where a setting has one, its noise is seen nowhere but in how far it
    lies from the others: then the wider counts of two intervals, of the variance pooled within settings and of the
    spread over them.

    The interval over blocks holds whatever a block does to the difference. From few blocks it can come out narrower by
    chance, so the wider of both is taken. No test decides between them: one that rarely sees what it tests for would
    choose the narrow interval exactly where it is wrong."""
    value = statistics.fmean(each.value for each in settings)
    found, over = _over_repeats_or_settings(value, settings)
    by_blocks = _by_blocks(value, settings)
    beyond = None
    if by_blocks is not None:
        beyond = wider(found, by_blocks)
    elif len(settings) == 1 and _has_blocks(settings):
        beyond = found
    return Average(this_session=found, sessions_like_it=beyond, by_blocks=by_blocks, session_over=over)


def _over_repeats_or_settings(value: float, settings: Sequence[Difference]) -> tuple[Estimate, str]:
    noise, count = pooled_noise(sample for each in settings for sample in each.samples), len(settings)
    if count == 1 and noise is None:
        why = "there is one pair of trials: run the sweep with repeats=5"
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
    """Return Student's interval over the blocks' means, each sweep of pairs by itself, and each side by itself, with
    the weight that it has in the average.

    None with one setting, whose interval over repeats is this one, and where there are too few blocks."""
    if len(settings) < 2 or not _has_blocks(settings):
        return None
    shares = []
    for side in _sides(settings):
        of_block = _of_block(side)
        for blocks in _sweeps(side, settings[0].is_paired):
            weight = math.fsum(len(each.keys() & set(blocks)) / len(each) for each in side) / len(side)
            of_mean = variance(of_block[block] for block in blocks) / len(blocks)
            shares.append((weight**2 * of_mean, len(blocks) - 1))
    return estimate_of_sum(value, shares)


def _has_blocks(settings: Sequence[Difference]) -> bool:
    """Return whether every sweep has enough blocks for an interval over them. Lone trials ran in no block, but pair in
    their order."""
    is_paired = settings[0].is_paired
    fewest = _FEWEST_BLOCKS if is_paired else _FEWEST_UNPAIRED
    sweeps = [blocks for side in _sides(settings) for blocks in _sweeps(side, is_paired)]
    return all(len(blocks) >= fewest and (is_paired or all(sweep for sweep, _ in blocks)) for blocks in sweeps)


def _sides(settings: Sequence[Difference]) -> list[tuple[Values, ...]]:
    return list(zip(*(each.samples for each in settings), strict=True))


def _sweeps(side: Sequence[Values], is_paired: bool) -> list[list[Block]]:
    """Return the blocks of each sweep; unpaired, those of all sweeps together."""
    found: dict[str, list[Block]] = {}
    for block in _blocks(side):
        found.setdefault(block[0] if is_paired else "all", []).append(block)
    return list(found.values())


def _of_block(side: Sequence[Values]) -> dict[Block, float]:
    """Return each block's mean, adjusted for the settings that it lacks (least squares, value ~ setting + block).

    Settings are centred first, so that blocks that share none stand about the same level."""
    means = [statistics.fmean(each.values()) for each in side]
    centred = [{block: value - mean for block, value in each.items()} for each, mean in zip(side, means, strict=True)]
    values, of_settings, of_blocks = _columns(centred)
    coefficients = np.linalg.lstsq(np.hstack([of_settings, of_blocks]), values, rcond=None)[0]
    return dict(zip(_blocks(side), map(float, coefficients[len(side) :]), strict=True))


def _columns(side: Sequence[Values]) -> tuple[Matrix, Matrix, Matrix]:
    """Return the values, and indicators of their settings and of their blocks."""
    rows = [(number, block, value) for number, each in enumerate(side) for block, value in sorted(each.items())]
    of_settings = np.array([[number == other for other in range(len(side))] for number, _, _ in rows], dtype=float)
    blocks = _blocks(side)
    of_blocks = np.array([[block == other for other in blocks] for _, block, _ in rows], dtype=float)
    return np.array([value for _, _, value in rows]), of_settings, of_blocks


def _blocks(side: Sequence[Values]) -> list[Block]:
    return sorted({block for each in side for block in each})
