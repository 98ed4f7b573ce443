"""A difference with its uncertainty."""

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import optimize, special  # its stats do the same ten times as slowly

CONFIDENCE = 0.95
POWER = 0.8
ROUNDING = 1e-12
"""Differences of logarithms (or of nats) below this are rounding of the arithmetic, not of anything measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A difference between two settings: of logarithms where the measure is compared by ratios, else plain.

    Without repeats there is no interval, and `why_no_interval` says so."""

    value: float
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    detectable: float | None = None
    """The smallest difference (on the same scale) that such an experiment detects with 80 % power. 0 only where
    repeats gave the very same figure, as peaks of memory do."""
    why_no_interval: str = ""
    error: float | None = None
    """Its standard error."""

    @property
    def seen(self) -> bool | None:
        """Return whether there is a difference: the interval does not contain 0. None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0

    @property
    def ratio(self) -> float:
        """Return the value as a ratio, for measures compared by ratios."""
        return math.exp(self.value)


def estimate(value: float, standard_error: float, df: float, among: int = 1) -> Estimate:
    """Return Student's interval with `df` degrees of freedom, and the smallest difference detected with a power of 0.8.
    Of `among` estimates all intervals hold together with 95 % (Bonferroni).

    Assumes that the noise is normal and alike in everything that went into the standard error. The smallest
    difference takes the standard error found here for the true one: with few degrees of freedom it is rough."""
    value, standard_error = (0.0 if abs(number) < ROUNDING else number for number in (value, standard_error))
    reach = _quantile(df, among) * standard_error
    detectable = _seen_in_units_of_standard_error(df, among) * standard_error
    return Estimate(value=value, low=value - reach, high=value + reach, detectable=detectable, error=standard_error)


def estimate_of_sum(value: float, shares: Sequence[tuple[float, float]], among: int = 1) -> Estimate:
    """Return Student's interval of a sum of independent figures with unequal noise.

    `shares` are their variances and the degrees of freedom of these. Those of the sum are Satterthwaite's (1946, An
    Approximate Distribution of Estimates of Variance Components), as in Welch's test.

    With three repeats a figure, 95 % intervals hold the truth in 95 to 97 % of cases where all are equally noisy, and
    in about 90 % at the worst, where one is ten times as noisy as the rest together."""
    variance = math.fsum(share for share, _ in shares)
    squares = math.fsum(share**2 / df for share, df in shares)
    df = variance**2 / squares if squares else math.fsum(df for _, df in shares)
    return estimate(value, math.sqrt(variance), df, among)


def variance(values: Iterable[float]) -> float:
    """Return the sample variance of two or more figures. `statistics.variance` is exact, and fifty times as slow."""
    told = list(values)
    mean = statistics.fmean(told)
    return math.fsum((value - mean) ** 2 for value in told) / (len(told) - 1)


def wider(one: Estimate, *others: Estimate) -> Estimate:
    """Return the one with the widest interval; of equals the first."""
    return max((one, *others), key=lambda found: 0.0 if found.high is None else found.high - found.value)


def percent(log_ratio: float) -> float:
    """Convert a difference of logarithms to a change in percent."""
    return 100.0 * math.expm1(log_ratio)


@functools.cache
def _quantile(df: float, among: int) -> float:
    return float(special.stdtrit(df, 1 - (1 - CONFIDENCE) / 2 / among))


@functools.cache
def _seen_in_units_of_standard_error(df: float, among: int) -> float:
    """Return the difference whose Student test rejects 0 with probability 0.8: Bloom's minimum detectable effect
    (1995), but by the noncentral t distribution. His sum t_0.975 + t_0.8 gives a power of 0.73 at 1 degree of freedom
    and of 0.77 at 2, and 0.8 only from about 6 on."""
    least = _quantile(df, among)

    def lacking(difference: float) -> float:
        return (
            POWER - 1 + float(special.nctdtr(df, difference, least))
        )  # seen with the wrong sign: never, at such powers

    return float(optimize.brentq(lacking, 0.5 * least, 2.0 * least + 2.0))
