"""Compare two models by their losses on the same rows, with an interval from a bootstrap over the rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
FEWEST_ROWS = 10
"""Below these the interval of a bootstrap is too narrow."""

_SEED = 0
_AT_ONCE = 2**22
"""Rows drawn at a time: 32 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The loss of one model minus that of another, in nats per token."""

    value: float
    low: float | None
    """The 95 % interval's ends. None with fewer than FEWEST_ROWS rows."""
    high: float | None
    rows: int
    improved: float
    """The share of the rows whose loss is lower."""

    @property
    def is_seen(self) -> bool:
        """Return whether the interval lies off zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def change(nats: Sequence[float], before: Sequence[float], tokens: Sequence[int]) -> Change | None:
    """Return the change from `before` to `nats`: both are sums per row over the same `tokens`.

    The unit is the row, since the tokens of one row depend on each other; the mean is weighted by tokens. The interval
    is the percentile interval of RESAMPLES resamples of the rows, widened for few rows to the quantiles that Student's
    t has (Hesterberg 2015, What Teachers Should Know about the Bootstrap, section 5.3). The seed is fixed, so that the
    same rows give the same interval.

    Returns: None without rows, or where a loss is not finite.
    """
    differences, weights = np.asarray(nats, float) - np.asarray(before, float), np.asarray(tokens, float)
    rows = len(weights)
    if rows == 0 or not np.isfinite(differences).all():
        return None
    low = high = None
    if rows >= FEWEST_ROWS:
        low, high = np.quantile(_resampled(differences, weights), _levels(rows))
    return Change(
        value=float(differences.sum() / weights.sum()),
        low=None if low is None else float(low),
        high=None if high is None else float(high),
        rows=rows,
        improved=float((differences < 0).mean()),
    )


def _resampled(differences: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the change in each resample, of shape (RESAMPLES,)."""
    rows = len(weights)
    draw = np.random.default_rng(_SEED)
    found = []
    for start in range(0, RESAMPLES, each := max(1, _AT_ONCE // rows)):
        chosen = draw.integers(rows, size=(min(each, RESAMPLES - start), rows))
        found.append(differences[chosen].sum(axis=1) / weights[chosen].sum(axis=1))
    return np.concatenate(found)


def _levels(rows: int) -> tuple[float, float]:
    """Return the quantiles of the resamples that make a 95 % interval."""
    from scipy.special import ndtr, stdtrit

    level = float(ndtr(math.sqrt(rows / (rows - 1)) * stdtrit(rows - 1, 0.025)))
    return level, 1 - level
