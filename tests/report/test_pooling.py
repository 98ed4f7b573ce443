"""One contrast over several sessions."""

import dataclasses
import math

import numpy as np
import pytest
from planted import factorial
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects

from lora_lab.report.findings import Findings, Question, find
from lora_lab.report.measures import THROUGHPUT
from lora_lab.report.statistics.pooling import random_effects
from lora_lab.store.trials import Trial

LEVELS = {"optimizer": ("adamw", "paged_adamw")}


def test_where_sessions_differ_the_mean_and_its_error_are_those_of_a_known_library() -> None:
    values, errors = np.array([0.05, -0.12, -0.05, 0.11]), np.array([0.014, 0.06, 0.082, 0.1])
    known = combine_effects(values, errors**2, method_re="iterated")
    found = random_effects(values, errors)
    assert found.q == pytest.approx(known.q)
    assert found.p == pytest.approx(known.test_homogeneity().pvalue)
    assert found.between**2 == pytest.approx(known.tau2)
    assert found.estimate.value == pytest.approx(known.mean_effect_re)
    reach = stats.t.isf(0.025, 3) * max(known.sd_eff_w_re_hksj, known.sd_eff_w_re)
    assert found.estimate.high == pytest.approx(found.estimate.value + reach)


def test_sessions_that_agree_by_chance_are_no_surer_than_their_own_errors() -> None:
    found = random_effects([0.1, 0.1, 0.1], [0.02, 0.03, 0.06])
    least = 1 / math.sqrt(sum(1 / error**2 for error in (0.02, 0.03, 0.06)))
    assert (found.between, found.q) == (0.0, pytest.approx(0.0, abs=1e-12))
    assert found.estimate.error == pytest.approx(least)


@pytest.mark.parametrize("between", [0.0, 0.03])
def test_mean_and_prediction_hold_as_often_as_they_say(between: float) -> None:
    """Six sessions with errors of 1 to 3 %, whose effects differ by 3 % or not at all."""
    draw, errors = np.random.default_rng(7), np.linspace(0.01, 0.03, 6)
    truths = 0.05 + between * draw.standard_normal((1000, 7))
    seen = truths[:, :6] + errors * draw.standard_normal((1000, 6))
    found = [random_effects(each, errors) for each in seen]
    held = sum(each.estimate.low <= 0.05 <= each.estimate.high for each in found)
    predicted = sum(
        each.prediction[0] <= truth <= each.prediction[1] for each, truth in zip(found, truths[:, 6], strict=True)
    )
    assert held in (range(929, 971) if between else range(980, 999))  # 99 % where the error may not fall any lower
    assert predicted in (range(890, 965) if between else range(985, 1001))  # 92 % is what a rough variance allows


def session(unit: str, effect: float) -> list[Trial]:
    """A sweep on the card `unit`, in which paged_adamw has this effect."""
    trials = factorial(LEVELS, {"optimizer=paged_adamw": effect}, noise=0.001, sweep=f"on {unit}")
    return [dataclasses.replace(each, tags=each.tags | {"device.uuid": unit}) for each in trials]


def findings(*sessions: list[Trial]) -> Findings:
    return find([trial for each in sessions for trial in each], (), Question(), "1")


def test_places_keep_their_own_contrasts_and_are_pooled_in_a_line_of_their_own() -> None:
    effects = (0.02, 0.06, 0.10)
    found = findings(*(session(f"GPU-{n}", effect) for n, effect in enumerate(effects)))
    own = [each.estimate.value for group in found.groups for each in group.contrasts if each.measure is THROUGHPUT]
    assert sorted(own) == pytest.approx(effects, abs=0.003)
    (pooled,) = found.pooled
    assert (len(pooled.sessions), pooled.places, pooled.without_error) == (3, 3, 0)
    assert pooled.pooled.estimate.value == pytest.approx(0.06, abs=0.002)
    assert pooled.pooled.between == pytest.approx(0.04, rel=0.1)
    low, high = pooled.pooled.prediction
    assert low < -0.4  # with three sessions it has one degree of freedom
    assert high > 0.5


def test_two_sweeps_of_one_place_are_two_sessions_and_one_pair_alone_has_no_error() -> None:
    sweeps = [factorial(LEVELS, noise=0.01, sweep=f"s{n}", repeats=4, random=n) for n in range(2)]
    lone = factorial(LEVELS, noise=0.01, sweep="lone", repeats=1)
    (pooled,) = findings(*sweeps, lone).pooled
    assert (len(pooled.sessions), pooled.places, pooled.without_error) == (2, 1, 1)
    assert pooled.pooled.prediction is None
    assert findings(sweeps[0], lone).pooled == ()
    assert findings(sweeps[0]).pooled == ()


def test_sessions_are_compared_over_the_settings_that_they_share() -> None:
    """One session ran a shape more, in which the effect is another; how long was measured is no other setting."""
    both, effect = LEVELS | {"shape": ("1x512", "2x512")}, {"optimizer=paged_adamw shape=2x512": 0.5}
    wide = factorial(both, effect, noise=0.001, sweep="wide")
    narrow = factorial(LEVELS | {"shape": ("1x512",)}, noise=0.001, sweep="narrow")
    longer = [dataclasses.replace(each, params=each.params | {"measure.steps": "200"}) for each in narrow]
    pooled = [each for each in findings(wide, longer).pooled if each.of == "paged_adamw"]
    assert [len(each.sessions) for each in pooled] == [2]
    assert pooled[0].pooled.estimate.value == pytest.approx(0.0, abs=0.003)
    assert [each.cells for _, each in pooled[0].sessions] == [1, 1]
    apart = factorial(LEVELS | {"shape": ("4x512",)}, noise=0.001, sweep="apart")
    assert findings(narrow, apart).pooled == ()
