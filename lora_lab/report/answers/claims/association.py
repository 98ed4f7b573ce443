"""Test a claim that more of one measure goes with less of another, on the trials of one environment.

The statistic is the slope of log(less) on log(more) over points. If one measure is computed from
the other (energy per token is power / throughput), an error in one is the opposite error in the other, and noise alone
gives a slope near -1. So

- each point's first measure is that of its even repeats, its second that of the odd ones: errors are not shared;
- no slope is taken unless the points differ by far more in the first measure than their repeats do. Noise in it draws
  a slope towards 0 by noise / (noise + true) variance (Fuller, Measurement Error Models, 1987, section 1.1): at most a
  tenth here.

Supported if the slope's interval is below 0, contradicted if above. A constant product (a constant power) gives -1;
between -1 and 0 the product grows with the first measure.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from lora_lab.report.answers.claims.study import AssociationClaim
from lora_lab.report.answers.claims.verdict import CONTRADICTED, SUPPORTED, Evidence, Found, ids
from lora_lab.report.answers.pareto import points
from lora_lab.report.measures import ENERGY, THROUGHPUT, Measure
from lora_lab.report.statistics.estimates import Estimate, estimate
from lora_lab.report.statistics.factors import design
from lora_lab.store.trials import Group, Trial

_LEAST_POINTS = 4
_BEYOND = 10.0
"""Least ratio of the variance between points to the variance by noise."""


@dataclass(frozen=True, slots=True)
class _Halves:
    """A point's repeats, split."""

    trials: tuple[Trial, ...]
    more: tuple[float, ...]
    """Logarithms, of every repeat."""
    less: tuple[float, ...]

    @property
    def x(self) -> float:
        return statistics.fmean(self.more[0::2])

    @property
    def y(self) -> float:
        return statistics.fmean(self.less[1::2])


def look(claim: AssociationClaim, group: Group, name: str, speaks_in: Sequence[str] | None) -> list[Found]:
    """Return the evidence of the group by regime; nothing if fewer than four points have repeats.

    Args:
        name: display name of the environment.
        speaks_in: regimes whose trials count; None for all."""
    found = points(group.measured, group.measured, design(group.measured).factors) if group.measured else []
    made = []
    for regime in dict.fromkeys(point.regime for point in found):
        inside = [half for point in found if point.regime == regime and (half := _halves(claim, point.trials))]
        if len(inside) < _LEAST_POINTS:
            continue
        slope, text = _slope(claim, inside)
        seen = Evidence(
            text=f"{name}, {regime}: {text}",
            place=group.place.label,
            regime=regime,
            trials=ids(trial for half in inside for trial in half.trials),
            estimate=slope,
        )
        made.append(Found(seen=(seen,), speaks=speaks_in is None or regime in speaks_in, word=_word(slope)))
    return made


def meaning(claim: AssociationClaim) -> str:
    """Return what the slope means, and its limits."""
    product = "the power drawn" if (claim.more, claim.less) == (THROUGHPUT, ENERGY) else "their product"
    return (
        f"An exponent of -1 means that {product} is constant; closer to 0, it grows with the first. "
        "This is one case, for this card and these settings: it cannot show that it holds in general."
    )


def _halves(claim: AssociationClaim, trials: Sequence[Trial]) -> _Halves | None:
    both = [
        (trial, math.log(more), math.log(less))
        for trial in sorted(trials, key=lambda trial: (trial.started_ms, trial.run_id))
        if (more := _of(claim.more, trial)) and (less := _of(claim.less, trial))
    ]
    return _Halves(*map(tuple, zip(*both, strict=True))) if len(both) > 1 else None


def _of(measure: Measure, trial: Trial) -> float | None:
    value = measure.of(trial)
    return value if value is not None and 0 < value < math.inf else None


def _word(slope: Estimate | None) -> str | None:
    if slope is None or slope.low is None or slope.high is None:
        return None
    return SUPPORTED if slope.high < 0 else CONTRADICTED if slope.low > 0 else None


def _slope(claim: AssociationClaim, inside: Sequence[_Halves]) -> tuple[Estimate | None, str]:
    more, less = [half.x for half in inside], [half.y for half in inside]
    fold = f"{math.exp(max(more) - min(more)):.3g}-fold in {claim.more.title}"
    over = f"over {len(inside)} points with repeats"
    noise = _noise(inside)
    if statistics.variance(more) <= _BEYOND * noise:
        return None, f"{over} {claim.more.title} differs too little compared with its noise ({fold})."
    line = stats.linregress(more, less)
    slope = estimate(float(line.slope), float(line.stderr), len(inside) - 2)
    ends = f"(95 %: {slope.low:.2f} to {slope.high:.2f})"
    goes = f"{claim.less.title} scales with {claim.more.title} with exponent {slope.value:.2f} {ends}"
    return slope, f"{over} ({fold}) {goes}."


def _noise(inside: Sequence[_Halves]) -> float:
    """Return the mean variance of a point's first measure due to repeats alone.

    It is the pooled variance of one trial over the number of even repeats."""
    squares = math.fsum(statistics.variance(half.more) * (len(half.more) - 1) for half in inside)
    one = squares / sum(len(half.more) - 1 for half in inside)
    return one * statistics.fmean(1 / len(half.more[0::2]) for half in inside)
