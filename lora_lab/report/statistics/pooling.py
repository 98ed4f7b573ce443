"""One contrast over several sessions, as random effects: a session's own effect differs from the mean of all.

A session is one sweep at one place. Trials of different sessions are never averaged: each session gives one figure with
its standard error, and how far these lie apart counts as noise of the mean. Sessions are compared over the settings of
everything else that all of them have: another grid has another average.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from lora_lab.report.measures import Measure
from lora_lab.report.statistics.blocks import figures, settings_besides
from lora_lab.report.statistics.contrasts import Contrast, contrast_of
from lora_lab.report.statistics.estimates import CONFIDENCE, ROUNDING, Estimate, estimate
from lora_lab.report.statistics.factors import Factor
from lora_lab.report.statistics.pairs import PairedSetting, paired_settings
from lora_lab.store.trials import Trial

Vector = NDArray[np.float64]
Setting = tuple[str, ...]
"""The values of everything but the factor."""

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
class Session:
    """The measured trials of one sweep at one place."""

    place: str
    """Its label."""
    trials: Sequence[Trial]
    factors: Sequence[Factor]
    """What contrasts are about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledContrast:
    """A contrast that several sessions have over the same settings, each by itself, and their mean."""

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


def pooled_contrasts(sessions: Sequence[Session], measures: Sequence[Measure]) -> list[PooledContrast]:
    """Pool each contrast that two or more sessions have, in the same regime and over the same settings of the rest. The
    error of a session's contrast is the one over repeats: what differs between sessions is taken from the sessions
    themselves."""
    if len(sessions) < 2:
        return []
    every = [trial for each in sessions for trial in each.trials]
    alike = {factor: _alike(every, factor) for factor in {factor for each in sessions for factor in each.factors}}
    found: dict[tuple[Measure, str, str, str, str], dict[int, dict[Setting, tuple[Factor, PairedSetting]]]] = {}
    for measure, (number, session) in itertools.product(measures, enumerate(sessions)):
        told = figures(session.trials, measure)
        for factor in session.factors:
            for level in factor.levels[1:]:
                for pairs in paired_settings(told, factor, level):
                    key = (measure, factor.name, factor.levels[0], level, pairs.regime)
                    here = found.setdefault(key, {}).setdefault(number, {})
                    here[alike[factor][pairs.trials[0].run_id]] = (factor, pairs)
    made = []
    for (measure, _, _, level, regime), by_session in found.items():
        numbers, settings = _shared(by_session)
        own = []
        for number in numbers:
            factor, _ = by_session[number][settings[0]]
            of_session = [by_session[number][setting][1] for setting in settings]
            own.append((sessions[number].place, contrast_of(of_session, factor, level, measure, regime)))
        made.append(_pooled(own))
    return [each for each in made if each is not None]


def _alike(trials: Sequence[Trial], factor: Factor) -> dict[str, Setting]:
    """Return each trial's settings besides the factor, by run id: those that all versions know. How long was measured
    makes no other configuration."""
    shared = set.intersection(*(set(trial.params) for trial in trials))
    kept = {key for key in shared if key.partition(".")[0] != "measure"}
    narrowed = [replace(trial, params={key: trial.params[key] for key in kept}) for trial in trials]
    return dict(zip((trial.run_id for trial in trials), settings_besides(narrowed, [factor]), strict=True))


def _shared(by_session: Mapping[int, Collection[Setting]]) -> tuple[list[int], list[Setting]]:
    """Return the most sessions that have a setting in common, and all settings that these share."""
    having: dict[tuple[int, ...], list[Setting]] = {}
    for setting in dict.fromkeys(setting for settings in by_session.values() for setting in settings):
        numbers = tuple(number for number, settings in by_session.items() if setting in settings)
        having.setdefault(numbers, []).append(setting)
    numbers = max(having, key=lambda each: (len(each), len(having[each])))
    return list(numbers), having[numbers]


def _pooled(sessions: Sequence[tuple[str, Contrast]]) -> PooledContrast | None:
    errors = [each.this_session.error for _, each in sessions]
    known = [(session, error) for session, error in zip(sessions, errors, strict=True) if error is not None]
    if len(known) < 2:
        return None
    first = known[0][0][1]
    return PooledContrast(
        measure=first.measure,
        factor=first.factor,
        of=first.of,
        over=first.over,
        regime=first.regime,
        sessions=tuple(session for session, _ in known),
        without_error=len(sessions) - len(known),
        pooled=random_effects([each.estimate.value for (_, each), _ in known], [error for _, error in known]),
    )
