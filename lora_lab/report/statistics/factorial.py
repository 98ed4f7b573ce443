"""The factorial model: every factor and every pair of them at once (statsmodels)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lab.report.measures import Measure
from lora_lab.report.statistics.blocks import TrialFigure, figures, settings_besides
from lora_lab.report.statistics.estimates import ROUNDING, Estimate, estimate
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.trials import Trial

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A factor's effect, averaged over the levels of the others."""

    factor: str
    of: str
    over: str
    estimate: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """Whether one factor's effect depends on another's level (F test)."""

    factors: tuple[str, str]
    f: float
    """Infinite where repeats gave the very same figures and these depart from the sum."""
    p: float
    largest: float
    """Largest departure of a cell from the sum of both effects, on the measure's scale."""
    at: tuple[str, str] = ("", "")
    """The levels of both in that cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorialModel:
    """log(measure) ~ block + factors + pairs of factors, fitted by least squares.

    Three-factor interactions count as noise. Intervals are Student's: they assume normal noise, equal in all
    trials given, so trials of different regimes should be fitted separately."""

    measure: Measure
    trials: int
    effects: tuple[Effect, ...]
    interactions: tuple[Interaction, ...]
    not_estimable: tuple[str, ...]
    """Interactions ("optimizer x precision") that these trials leave open, because cells are missing or nothing would
    be left to estimate noise. The model assumes that there are none."""
    residual_sd: float
    """Of one trial about the model, on the measure's scale: the residual SD."""
    r_squared: float
    """Share of the squares about the mean that the model explains, blocks with it."""
    df: int = 0
    """Degrees of freedom of the residual."""
    lack_of_fit: float | None = None
    """p of the F test whether points depart from the model by more than their repeats do from one another: small where
    three factors act together, or an interaction in `not_estimable` is one. None where nothing was repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Term:
    """A factor or a pair of factors, sum-coded: its columns add up to 0 over the levels, so that a factor's effect is
    the average over the grid of the others' levels, and not the one at their baselines."""

    factors: tuple[Factor, ...]
    levels: tuple[tuple[str, ...], ...]
    """Of each factor, those that were measured."""
    columns: Matrix

    @property
    def name(self) -> str:
        return " x ".join(factor.name for factor in self.factors)


def factorial(trials: Sequence[Trial], factors: Sequence[Factor], measure: Measure) -> FactorialModel | str:
    """Fit the model, or return why it cannot be fitted.

    Whatever else differs between trials (settings of no factor) splits blocks: only what is alike in it is compared.

    Args:
        trials: measured ones of one place; those without the figure are left out.
    """
    found = figures(trials, measure)
    values = np.array([figure.value for figure in found])
    if len(found) < 2 or np.ptp(values) < ROUNDING:
        return f"{len(found)} trials have {measure.title}" + (", all the same" if len(found) > 1 else "")
    singles = [term for factor in factors if (term := _single(factor, found)) is not None]
    if not singles:
        return "no factor has two levels among the measured trials"
    blocks = _indicators(_split_blocks(found, factors))
    tied = _tied(blocks, singles)
    if tied:
        return tied
    pairs, left_out = _estimable(blocks, singles, [_pair(one, two) for one, two in itertools.combinations(singles, 2)])
    if _columns(blocks, [*singles, *pairs]).shape[1] >= len(found):
        left_out, pairs = [*left_out, *pairs], []
    needed = _columns(blocks, singles).shape[1]
    if needed >= len(found):
        return (
            f"{len(found)} trials have {measure.title}, and blocks and factors alone take {needed} numbers: nothing is "
            "left to separate noise from effects. Run more repeats (repeats=5)"
        )
    return _fit(found, values, blocks, singles, pairs, left_out, measure)


def _fit(
    found: Sequence[TrialFigure],
    values: Matrix,
    blocks: Matrix,
    singles: Sequence[_Term],
    pairs: Sequence[_Term],
    left_out: Sequence[_Term],
    measure: Measure,
) -> FactorialModel:
    from statsmodels.regression.linear_model import OLS  # a second's import, for the report alone

    terms = [*singles, *pairs]
    columns = _columns(blocks, terms)
    fitted = OLS(values, columns).fit()
    noise = float(fitted.ssr) if float(fitted.ssr) > len(found) * ROUNDING**2 else 0.0
    ends = list(itertools.accumulate((term.columns.shape[1] for term in terms), initial=blocks.shape[1]))
    where = {term.name: slice(start, end) for term, start, end in zip(terms, ends, ends[1:], strict=False)}
    cells = [tuple(term.factors[0].level(figure.trial) for term in singles) for figure in found]
    order = sorted((term.name for term in left_out), key=[term.name for term in (*pairs, *left_out)].index)
    return FactorialModel(
        measure=measure,
        trials=len(found),
        effects=tuple(effect for term in singles for effect in _effects(fitted, term, where[term.name])),
        interactions=tuple(_interaction(fitted, noise, term, where[term.name]) for term in pairs),
        not_estimable=tuple(order),
        residual_sd=math.sqrt(noise / fitted.df_resid),
        r_squared=1.0 - noise / float(np.sum((values - values.mean()) ** 2)),
        df=int(fitted.df_resid),
        lack_of_fit=_lack_of_fit(values, columns, np.hstack([blocks, _indicators(cells)]), noise),
    )


def _effects(fitted: Any, term: _Term, where: slice) -> list[Effect]:
    """Compare each level with the first: a contrast of the coefficients, by Student's t."""
    codes = _codes(len(term.levels[0]))
    contrasts = np.zeros((len(codes) - 1, len(fitted.params)))
    contrasts[:, where] = codes[1:] - codes[0]
    tested = fitted.t_test(contrasts)
    over, *others = term.levels[0]
    return [
        Effect(
            factor=term.name,
            of=of,
            over=over,
            estimate=estimate(float(value), float(error), float(fitted.df_resid)),
        )
        for of, value, error in zip(others, np.atleast_1d(tested.effect), np.atleast_1d(tested.sd).ravel(), strict=True)
    ]


def _interaction(fitted: Any, noise: float, term: _Term, where: slice) -> Interaction:
    """Test one interaction. All of its cells are measured, otherwise it would not be estimable."""
    rows, columns = (_codes(len(levels)) for levels in term.levels)
    departures = rows @ fitted.params[where].reshape(rows.shape[1], columns.shape[1]) @ columns.T
    sizes = np.abs(departures)
    last = int(np.flatnonzero(sizes >= sizes.max() * (1 - 1e-9))[-1])  # of equals the one furthest from the baselines
    row, column = divmod(last, len(columns))
    largest = float(departures[row, column]) if sizes.max() > ROUNDING else 0.0
    if noise:
        test = fitted.f_test(np.eye(len(fitted.params))[where])
        f, p = float(np.squeeze(test.fvalue)), float(np.squeeze(test.pvalue))
    else:
        f, p = (math.inf, 0.0) if largest else (0.0, 1.0)
    one, two = term.factors
    at = (term.levels[0][row], term.levels[1][column])
    return Interaction(factors=(one.name, two.name), f=f, p=p, largest=largest, at=at)


def _lack_of_fit(values: Matrix, columns: Matrix, saturated: Matrix, noise: float) -> float | None:
    """Return p of the lack-of-fit F test against the saturated model (one mean per point, plus blocks)."""
    from scipy import stats

    rank = int(np.linalg.matrix_rank(saturated))
    between, within = rank - columns.shape[1], len(values) - rank
    if between < 1 or within < 1:
        return None
    residual = values - saturated @ np.linalg.lstsq(saturated, values, rcond=None)[0]
    repeats = float(residual @ residual)
    if repeats <= len(values) * ROUNDING**2:
        return 0.0 if noise else 1.0
    return float(stats.f.sf(max(noise - repeats, 0.0) / between / (repeats / within), between, within))


def _single(factor: Factor, found: Sequence[TrialFigure]) -> _Term | None:
    told = [factor.level(figure.trial) for figure in found]
    levels = tuple(level for level in factor.levels if level in set(told))
    if len(levels) < 2:
        return None
    return _Term(factors=(factor,), levels=(levels,), columns=_codes(len(levels))[[levels.index(one) for one in told]])


def _pair(one: _Term, two: _Term) -> _Term:
    products = one.columns[:, :, None] * two.columns[:, None, :]
    return _Term(
        factors=one.factors + two.factors,
        levels=one.levels + two.levels,
        columns=products.reshape(len(products), -1),
    )


def _codes(levels: int) -> Matrix:
    """Sum coding: a row of each level."""
    return np.vstack([np.eye(levels - 1), -np.ones(levels - 1)])


def _indicators(groups: Sequence[object]) -> Matrix:
    told = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.eye(len(told))[[told[group] for group in groups]]


def _columns(blocks: Matrix, terms: Sequence[_Term]) -> Matrix:
    return np.hstack([blocks, *(term.columns for term in terms)])


def _rank(blocks: Matrix, terms: Sequence[_Term]) -> int:
    return int(np.linalg.matrix_rank(_columns(blocks, terms)))


def _split_blocks(found: Sequence[TrialFigure], factors: Sequence[Factor]) -> list[object]:
    settings = settings_besides([figure.trial for figure in found], factors)
    return [(figure.block, setting) for figure, setting in zip(found, settings, strict=True)]


def _unique(blocks: Matrix, terms: Sequence[_Term], term: _Term, rank: int) -> bool:
    """Return whether no column of `term` is a sum of the blocks' and the other terms'."""
    others = [other for other in terms if other is not term]
    return rank - _rank(blocks, others) == int(term.columns.shape[1])


def _estimable(blocks: Matrix, singles: Sequence[_Term], pairs: Sequence[_Term]) -> tuple[list[_Term], list[_Term]]:
    """Return the interactions that the design separates from everything else in the model, and the others.

    The result does not depend on any order: of two that are aliased neither is taken."""
    terms = [*singles, *pairs]
    rank = _rank(blocks, terms)
    kept = [pair for pair in pairs if _unique(blocks, terms, pair, rank)]
    return kept, [pair for pair in pairs if pair not in kept]


def _tied(blocks: Matrix, singles: Sequence[_Term]) -> str:
    """Return which factors are aliased with others or with the blocks; "" if none is."""
    everywhere = np.ones((len(blocks), 1))
    for start, why in (
        (everywhere, "they changed together in these trials"),
        (blocks, "their levels ran in different sweeps or repeats, or with other settings; fit each sweep by itself"),
    ):
        rank = _rank(start, singles)
        if rank < start.shape[1] + sum(term.columns.shape[1] for term in singles):
            names = [term.name for term in singles if not _unique(start, singles, term, rank)]
            return f"the effects of {', '.join(names)} cannot be separated: {why}"
    return ""
