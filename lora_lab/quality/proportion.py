"""A share of few things with its interval."""

import math

_Z = 1.959963984540054
"""The normal distribution's quantile for 95 %."""


def wilson(hits: int, among: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927, Probable Inference, the Law of Succession, and Statistical
    Inference). It is sensible for 0 and for all of them, too.

    Raises: ValueError when there is nothing to take a share of."""
    if among <= 0:
        raise ValueError("a share needs at least one thing")
    share, scale = hits / among, 1 + _Z**2 / among
    middle = share + _Z**2 / (2 * among)
    reach = _Z * math.sqrt(share * (1 - share) / among + _Z**2 / (4 * among**2))
    # at the ends the formula gives 0 and 1 but for rounding
    low = 0.0 if hits == 0 else (middle - reach) / scale
    return low, 1.0 if hits == among else (middle + reach) / scale
