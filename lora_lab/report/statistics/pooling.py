"""One contrast over several sessions, as random effects: a session's own effect differs from the mean of all.

A session is one sweep at one place. Trials of different sessions are never averaged: each session gives one figure with
its standard error, and how far these lie apart counts as noise of the mean.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from lora_lab.report.measures import Measure
from lora_lab.report.statistics.contrasts import Contrast
from lora_lab.report.statistics.estimates import CONFIDENCE, ROUNDING, Estimate, estimate

Vector = NDArray[np.float64]

_FEWEST_TO_PREDICT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomEffects:
    """The mean effect over sessions, and how much it differs between them."""

    estimate: Estimate
    """The mean over all sessions of this kind, with its interval."""
    between: float
    """The standard deviation of the sessions' true effects (tau), on the estimate's scale; 0 where noise explains
    all."""
    q: float
    """Cochran's Q: the squares of the sessions' distances from their mean, in units of their errors. Without
    differences between sessions it is chi squared with one degree of freedom less than there are sessions."""
    p: float
    """How often Q would be as large by noise alone."""
    prediction: tuple[float, float] | None
    """Where the effect of one more session of this kind lies in 95 of 100 cases; None with fewer than three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledContrast:
    """A contrast that several sessions have, each by itself, and their mean."""

    measure: Measure
    factor: str
    of: str
    over: str
    regime: str
    sessions: tuple[tuple[str, Contrast], ...]
    """Those that count: the label of the place, and the session's own contrast."""
    without_error: int
    """Sessions whose contrast has no interval, and which are left out."""
    pooled: RandomEffects

    @property
    def places(self) -> int:
        """Return the number of places among the sessions."""
        return len({place for place, _ in self.sessions})


def random_effects(values: Sequence[float], errors: Sequence[float]) -> RandomEffects:
    """Pool two or more effects with their standard errors.

    The variance between them is Paule and Mandel's (1982, Consensus Values and Weighting Factors). The interval is
    Student's with Hartung and Knapp's standard error (2001, On Tests of the Overall Treatment Effect), never smaller
    than the ordinary one (Roever et al. 2015, Hartung-Knapp-Sidik-Jonkman Approach and Its Modification). The
    prediction interval is that of Higgins, Thompson and Spiegelhalter (2009, A Re-evaluation of Random-Effects
    Meta-Analysis).

    The errors count as known. They come from few pairs each, so Q and the variance between are rough."""
    effects = np.asarray(values, dtype=float)
    variances = np.maximum(np.asarray(errors, dtype=float), ROUNDING) ** 2
    sessions = len(effects)
    q = _q(effects, variances)
    between = _between(effects, variances)
    weights = 1 / (variances + between)
    mean = float(np.average(effects, weights=weights))
    spread = float(weights @ (effects - mean) ** 2) / (sessions - 1)
    error = math.sqrt(max(1.0, spread) / float(weights.sum()))
    prediction = None
    if sessions >= _FEWEST_TO_PREDICT:
        reach = float(stats.t.isf((1 - CONFIDENCE) / 2, sessions - 2)) * math.sqrt(between + error**2)
        prediction = (mean - reach, mean + reach)
    return RandomEffects(
        estimate=estimate(mean, error, sessions - 1),
        between=math.sqrt(between),
        q=q,
        p=float(stats.chi2.sf(q, sessions - 1)),
        prediction=prediction,
    )


def _q(effects: Vector, variances: Vector) -> float:
    weights = 1 / variances
    return float(weights @ (effects - np.average(effects, weights=weights)) ** 2)


def _between(effects: Vector, variances: Vector) -> float:
    """Return the variance between sessions with which Q is what noise would make it; 0 where it already is less.

    DerSimonian and Laird's closed form gives nearly all weight to a session whose few pairs happen to agree."""
    df = len(effects) - 1
    if _q(effects, variances) <= df:
        return 0.0
    most = float(np.ptp(effects)) ** 2  # more than the effects' variance: with it Q is below df
    return float(optimize.brentq(lambda between: _q(effects, variances + between) - df, 0.0, most))


def pooled_contrasts(sessions: Iterable[tuple[str, Sequence[Contrast]]]) -> list[PooledContrast]:
    """Pool each contrast that two or more sessions have, in the same regime. The interval of a session's contrast is
    the one over repeats: what differs between sessions is taken from the sessions themselves.

    Args:
        sessions: the label of each one's place, and its contrasts."""
    found: dict[tuple[str, str, str, str, str], list[tuple[str, Contrast]]] = {}
    for place, made in sessions:
        for each in made:
            key = (each.measure.name, each.factor, each.of, each.over, each.regime)
            found.setdefault(key, []).append((place, each))
    return [pooled for each in found.values() if (pooled := _pooled(each)) is not None]


def _pooled(every: Sequence[tuple[str, Contrast]]) -> PooledContrast | None:
    counted = [(place, each, each.this_session.error) for place, each in every]
    known = [(place, each, error) for place, each, error in counted if error is not None]
    if len(known) < 2:
        return None
    _, first, _ = known[0]
    return PooledContrast(
        measure=first.measure,
        factor=first.factor,
        of=first.of,
        over=first.over,
        regime=first.regime,
        sessions=tuple((place, each) for place, each, _ in known),
        without_error=len(every) - len(known),
        pooled=random_effects([each.estimate.value for _, each, _ in known], [error for _, _, error in known]),
    )
