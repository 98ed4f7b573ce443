"""Each factor's share of the difference between two points (Shapley's split of the log ratio).

Between two points that differ in k factors lie 2^k corners: every choice of which factors have already changed. Each
order of changing them one after the other takes a path over k + 1 corners and gives each factor one step of it. A
factor's part is its step, averaged over all k! orders: the only split whose parts add up to the whole, that gives
factors with equal effects equal parts and one without effect none, and that is additive (Shapley 1953, A Value
for n-Person Games). How much a part depends on the order shows in its step where it goes first and where it goes last.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from lora_lab.config import InvalidInput
from lora_lab.report.measures import Measure
from lora_lab.report.statistics.blocks import TrialFigure, figures, regime_of, settings_besides
from lora_lab.report.statistics.estimates import ROUNDING, Estimate, estimate, wider
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.trials import Trial

Corner = frozenset[str]
"""The factors that are at the end's level already."""

_FITTED = 1e-9
"""Largest residual, relative to the figure, of a figure that is fitted exactly except for rounding."""

Weights = Mapping[Corner, float]
"""A difference as a weighted sum over the corners' means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorPart:
    """One factor's part."""

    factor: str
    of: str
    over: str
    """The same as `of` where the factor did not change: its part is 0 by definition, and the estimate None."""
    estimate: Estimate | None
    first: Estimate | None = None
    """Its effect where it alone is changed, everything else as at the start."""
    last: Estimate | None = None
    """Its effect where it is changed last, everything else as at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The difference between two points and its parts, which add up to it."""

    measure: Measure
    start: Mapping[str, str]
    """Level of each factor."""
    end: Mapping[str, str]
    total: Estimate | None
    """None where a point has no measured trial."""
    parts: tuple[FactorPart, ...]
    """Empty where corners are missing."""
    missing: tuple[Mapping[str, str], ...]
    """Points between the two that no measured trial has, and without which nothing can be split."""
    regimes: Mapping[str, str]
    """Regime at each corner, by its label: the levels of the factors that change ("paged_adamw, 1x512")."""
    trials: int = 0
    """Measured trials at the corners."""
    residual_sd: float | None = None
    """Of one trial about its corner's mean, blocks taken off, on the measure's scale; None without repeats."""
    corners: Mapping[str, float] = field(default_factory=dict)
    """Mean of each corner minus the start's, blocks taken off, on the measure's scale, by its label. Empty where
    corners are missing."""


def split(
    trials: Sequence[Trial],
    factors: Sequence[Factor],
    measure: Measure,
    start: Mapping[str, str],
    end: Mapping[str, str],
) -> Split:
    """Split measure(end) / measure(start) among the factors that differ.

    Trials at a corner that are alike in everything else count. If several such sets exist: the one that covers
    most corners, then the one with most trials. The corners' means and the blocks are fitted together by least squares
    (value ~ corner + block), so that a corner whose trial was lost in one block is not compared with other blocks'
    figures; every part is a weighted sum of these means, with an interval that lets every corner have its own noise
    (`_Fit.estimate`).

    Args:
        trials: measured ones of one place; those without the figure are left out.
        start, end: level of factors by name. What only one of them names is the same in both;
            factors that neither names must only be alike.

    Raises: InvalidInput when one of them names an unknown factor.
    """
    start, end = {**{name: end[name] for name in end if name not in start}, **start}, {**start, **end}
    named = _named(factors, start)
    changed = [factor.name for factor in named if start[factor.name] != end[factor.name]]
    needed = [frozenset(some) for size in range(len(changed) + 1) for some in itertools.combinations(changed, size)]
    points = {corner: {name: (end if name in corner else start)[name] for name in start} for corner in needed}
    labels = {corner: ", ".join(point[name] for name in changed) or "one point" for corner, point in points.items()}
    at = _alike(figures(trials, measure), named, points)
    missing = [corner for corner in needed if corner not in at]
    ends = [needed[0], needed[-1]]
    used = at if not missing else {corner: at[corner] for corner in ends if corner in at}
    fit = None if any(corner not in at for corner in ends) else _fit(used)
    return Split(
        measure=measure,
        start=start,
        end=end,
        total=None if fit is None else fit.estimate(_step(ends[0], ends[1])),
        parts=() if fit is None or missing else tuple(_part(fit, factor.name, start, end, changed) for factor in named),
        missing=tuple(points[corner] for corner in missing),
        regimes={
            labels[corner]: regime_of([figure.trial for figure in at[corner]]) for corner in needed if corner in at
        },
        trials=sum(len(found) for found in at.values()),
        residual_sd=None if fit is None else fit.residual_sd,
        corners={}
        if fit is None or missing
        else {labels[corner]: fit.value(_step(ends[0], corner)) for corner in needed},
    )


def _named(factors: Sequence[Factor], start: Mapping[str, str]) -> list[Factor]:
    known = {factor.name: factor for factor in factors}
    strange = sorted(start.keys() - known.keys())
    if strange:
        raise InvalidInput(f"{', '.join(strange)}: unknown factor. Factors are: {', '.join(known) or 'none'}")
    return [factor for factor in factors if factor.name in start]


def _alike(
    found: Sequence[TrialFigure], factors: Sequence[Factor], points: Mapping[Corner, Mapping[str, str]]
) -> dict[Corner, list[TrialFigure]]:
    """Return the figures at each corner, of the set of trials alike in everything else that covers the corners best."""
    settings = settings_besides([figure.trial for figure in found], factors)
    corner_of = {tuple(point[factor.name] for factor in factors): corner for corner, point in points.items()}
    sets: dict[tuple[str, ...], dict[Corner, list[TrialFigure]]] = {}
    for figure, setting in zip(found, settings, strict=True):
        corner = corner_of.get(tuple(factor.level(figure.trial) for factor in factors))
        if corner is not None:
            sets.setdefault(setting, {}).setdefault(corner, []).append(figure)
    ends = {min(points, key=len), max(points, key=len)}

    def coverage(setting: tuple[str, ...]) -> tuple[bool, int, int]:
        at = sets[setting]
        return ends <= at.keys(), len(at), sum(len(figures) for figures in at.values())

    return sets[max(sorted(sets), key=coverage)] if sets else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """Means of corners, and how sure differences between them are."""

    corners: Sequence[Corner]
    means: NDArray[np.float64]
    """Up to a constant that is the same for all, and drops out of differences."""
    of_trials: NDArray[np.float64]
    """What each mean is made of: corners x trials."""
    at: NDArray[np.float64]
    """Which trial is at which corner: 1 or 0, corners x trials."""
    leaves: NDArray[np.float64]
    """Residuals from figures: trials x trials."""
    residuals: NDArray[np.float64]
    df: int
    """Of the residuals; 0 if noise cannot be estimated."""
    why_no_interval: str

    @property
    def residual_sd(self) -> float | None:
        return math.sqrt(float(np.sum(self.residuals**2)) / self.df) if self.df else None

    def value(self, weights: Weights) -> float:
        return float(self._vector(weights) @ self.means)

    def estimate(self, weights: Weights) -> Estimate:
        """Return the estimate with a standard error that is valid for unequal noise at the corners: HC2 (MacKinnon and
        White 1985, Some Heteroskedasticity-Consistent Covariance Matrix Estimators), every squared residual over its
        own expectation. Its degrees of freedom are Satterthwaite's for this quadratic form (Bell and McCaffrey 2002,
        Bias Reduction in Standard Errors), but with the corners' variances as found instead of equal ones.

        A trial that is fitted exactly (its corner's only one) has no information about its noise. If one counts, the
        wider of this interval and that by the pooled residual is used."""
        value, sd = self.value(weights), self.residual_sd
        if sd is None:
            return Estimate(value=value, why_no_interval=self.why_no_interval)
        of_trials = self._vector(weights) @ self.of_trials
        free = np.diag(self.leaves)
        told = free > _FITTED
        scale = np.where(told, of_trials**2 / np.where(told, free, 1.0), 0.0)
        error = math.sqrt(float(scale @ self.residuals**2))
        found = estimate(value, error, self._df(scale))
        pooled = estimate(value, sd * float(np.linalg.norm(of_trials)), self.df)
        lone = bool(np.any(np.abs(of_trials[~told]) > _FITTED))
        return wider(found, pooled) if lone else found

    def _df(self, scale: NDArray[np.float64]) -> float:
        form = (self.leaves * scale) @ self.leaves * self._variances()
        spread = float(np.sum(form * form.T))
        return min(max(float(np.trace(form)) ** 2 / spread, 1.0), self.df) if spread > 0 else self.df

    def _variances(self) -> NDArray[np.float64]:
        """Return each trial's variance, by its corner, in units of the pooled one: those whose expected squares of
        residuals are nearest to what was found, none below a hundredth: that none is seen in three repeats is
        chance."""
        sd = self.residual_sd
        if not sd:
            return np.ones(len(self.residuals))
        found, _ = optimize.nnls(self.at @ self.leaves**2 @ self.at.T, self.at @ (self.residuals / sd) ** 2)
        return np.asarray(np.maximum(found, 0.01) @ self.at)

    def _vector(self, weights: Weights) -> NDArray[np.float64]:
        return np.array([weights.get(corner, 0.0) for corner in self.corners])


def _fit(at: Mapping[Corner, Sequence[TrialFigure]]) -> _Fit:
    corners = list(at)
    told = [(corner, figure) for corner in corners for figure in at[corner]]
    values = np.array([figure.value for _, figure in told])
    blocks = list(dict.fromkeys(figure.block for _, figure in told))
    of_corners = np.array([[corner == other for other in corners] for corner, _ in told], dtype=float)
    of_blocks = np.array([[figure.block == block for block in blocks[1:]] for _, figure in told], dtype=float)
    columns = np.hstack([of_corners, of_blocks.reshape(len(told), -1)])
    why = "too few repeats to estimate noise: run the sweep with repeats=5"
    if np.linalg.matrix_rank(columns) < columns.shape[1]:
        columns = of_corners
        why = "the points ran in different sweeps or repeats, so the difference includes theirs: run them in one sweep"
        df = 0
    else:
        df = len(told) - columns.shape[1]
    inverse = np.linalg.pinv(columns)
    leaves = np.eye(len(told)) - columns @ inverse
    residuals = leaves @ values
    return _Fit(
        corners=corners,
        means=(inverse @ values)[: len(corners)],
        of_trials=inverse[: len(corners)],
        at=of_corners.T,
        leaves=leaves,
        residuals=residuals if float(np.sum(residuals**2)) > len(told) * ROUNDING**2 else np.zeros(len(told)),
        df=df,
        why_no_interval=why,
    )


def _part(fit: _Fit, name: str, start: Mapping[str, str], end: Mapping[str, str], changed: Sequence[str]) -> FactorPart:
    if name not in changed:
        return FactorPart(factor=name, of=end[name], over=start[name], estimate=None)
    others = [other for other in changed if other != name]
    return FactorPart(
        factor=name,
        of=end[name],
        over=start[name],
        estimate=fit.estimate(_shapley(name, others)),
        first=fit.estimate(_step(frozenset(), frozenset([name]))),
        last=fit.estimate(_step(frozenset(others), frozenset(changed))),
    )


def _step(start: Corner, end: Corner) -> Weights:
    return {start: -1.0, end: 1.0} if start != end else {}


def _shapley(name: str, others: Sequence[str]) -> Weights:
    """Return the factor's steps from every corner without it, each weighted with the share of orders that take it
    there."""
    k = len(others) + 1
    weights: dict[Corner, float] = {}
    for size in range(k):
        share = math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k)
        for before in itertools.combinations(others, size):
            weights[frozenset(before)] = -share
            weights[frozenset((*before, name))] = share
    return weights
