"""The average of a difference over settings (cells), and how sure it is when noise is not the same everywhere."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lora_lab.report.statistics.blocks import Block
from lora_lab.report.statistics.estimates import ROUNDING, Estimate, estimate, estimate_of_sum

Cell = Mapping[Block, float]
"""The differences found in one setting, each by its block."""

_BLOCKS_DIFFER = 0.05
"""Below this p the blocks' own differences count as noise, too."""
_FEWEST_BLOCKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """The mean of the cells' means."""

    estimate: Estimate
    interval_over: str
    """What the interval counts as noise: "repeats", "settings", "blocks", or "nothing" (no interval)."""
    by_blocks: Estimate | None
    """The same value with the interval over blocks; None where that can't be told."""


def average(cells: Sequence[Cell]) -> Average:
    """The mean of the cells' means, with an interval over repeats where there are enough of them.

    Over repeats, each cell has its own noise where each has two pairs or more (Welch's standard error, Satterthwaite's
    degrees of freedom). Where a cell has one pair, its noise is seen nowhere but in how far it lies from the others:
    then the wider counts of two intervals, of the variance pooled within cells and of the spread over settings.
    Where blocks differ beyond noise (`_blocks_differ`), the interval over blocks counts if it is wider."""
    value = statistics.fmean(statistics.fmean(cell.values()) for cell in cells)
    found, over = _over_repeats_or_settings(value, [list(cell.values()) for cell in cells])
    by_blocks = _by_blocks(value, cells)
    if by_blocks is not None and _reach(by_blocks) > _reach(found) and _blocks_differ(cells):
        return Average(estimate=by_blocks, interval_over="blocks", by_blocks=by_blocks)
    return Average(estimate=found, interval_over=over, by_blocks=by_blocks)


def _over_repeats_or_settings(value: float, cells: Sequence[Sequence[float]]) -> tuple[Estimate, str]:
    df = sum(len(cell) - 1 for cell in cells)
    if len(cells) == 1 and not df:
        why = "there is one pair of trials: run the sweep with repeats=3"
        return Estimate(value=value, why_no_interval=why), "nothing"
    if all(len(cell) > 1 for cell in cells):
        shares = [(statistics.variance(cell) / len(cell) / len(cells) ** 2, len(cell) - 1) for cell in cells]
        return estimate_of_sum(value, shares), "repeats"
    means = [statistics.fmean(cell) for cell in cells]
    spread = estimate(value, statistics.stdev(means) / math.sqrt(len(cells)), len(cells) - 1)
    if not df:
        return spread, "settings"
    squares = math.fsum((one - mean) ** 2 for cell, mean in zip(cells, means, strict=True) for one in cell)
    of_mean = squares / df * math.fsum(1 / len(cell) for cell in cells) / len(cells) ** 2
    pooled = estimate(value, math.sqrt(of_mean), df)
    return (pooled, "repeats") if _reach(pooled) > _reach(spread) else (spread, "settings")


def _by_blocks(value: float, cells: Sequence[Cell]) -> Estimate | None:
    """The interval that holds whatever a block does to the difference in all its cells: Student's over the blocks'
    mean differences, each sweep by itself with the weight that it has in the average.

    A block's mean is adjusted for the cells that it lacks (least squares, difference ~ cell + block). None with one
    cell, whose interval over repeats is this one, and where a sweep has fewer than three blocks."""
    sweeps: dict[str, list[Block]] = {}
    for block in _blocks(cells):
        sweeps.setdefault(block[0], []).append(block)
    if len(cells) < 2 or any(len(blocks) < _FEWEST_BLOCKS for blocks in sweeps.values()):
        return None
    of_block = _fit(cells).of_block
    shares = []
    for blocks in sweeps.values():
        weight = math.fsum(len(cell.keys() & set(blocks)) / len(cell) for cell in cells) / len(cells)
        variance = statistics.variance(of_block[block] for block in blocks) / len(blocks)
        shares.append((weight**2 * variance, len(blocks) - 1))
    return estimate_of_sum(value, shares)


def _blocks_differ(cells: Sequence[Cell]) -> bool:
    """Whether blocks explain more of the differences' spread about their cells' means than noise would (F test of
    blocks in difference ~ cell + block, p < 0.05)."""
    fit = _fit(cells)
    if not fit.df or not fit.df_of_blocks:
        return False
    least = fit.df * ROUNDING**2
    between, within = (squares if squares > least else 0.0 for squares in (fit.squares_of_blocks, fit.squares))
    if not within:
        return between > 0
    return float(stats.f.sf(between / fit.df_of_blocks / (within / fit.df), fit.df_of_blocks, fit.df)) < _BLOCKS_DIFFER


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """difference ~ cell + block, by least squares."""

    of_block: Mapping[Block, float]
    squares: float
    """Left over."""
    df: int
    squares_of_blocks: float
    """That blocks explain besides cells."""
    df_of_blocks: int


def _fit(cells: Sequence[Cell]) -> _Fit:
    told = [(number, block, value) for number, cell in enumerate(cells) for block, value in sorted(cell.items())]
    blocks = _blocks(cells)
    values = np.array([value for _, _, value in told])
    of_cells = np.array([[number == other for other in range(len(cells))] for number, _, _ in told], dtype=float)
    of_blocks = np.array([[block == other for other in blocks] for _, block, _ in told], dtype=float)
    both = np.hstack([of_cells, of_blocks])
    numbers = np.linalg.pinv(both) @ values
    squares, squares_cells = (_left(columns, values) for columns in (both, of_cells))
    rank = int(np.linalg.matrix_rank(both))
    return _Fit(
        of_block=dict(zip(blocks, map(float, numbers[len(cells) :]), strict=True)),
        squares=squares,
        df=len(told) - rank,
        squares_of_blocks=squares_cells - squares,
        df_of_blocks=rank - len(cells),
    )


def _left(columns: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    return float(np.sum((values - columns @ (np.linalg.pinv(columns) @ values)) ** 2))


def _blocks(cells: Sequence[Cell]) -> list[Block]:
    return sorted({block for cell in cells for block in cell})


def _reach(found: Estimate) -> float:
    return 0.0 if found.high is None else found.high - found.value
