import dataclasses
import math
import random

import pytest
from conftest import some_by_day
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import factorial as planted
from planted import trial

from lora_lab.report.measures import ENERGY, LOSS, THROUGHPUT, VRAM
from lora_lab.report.statistics.estimates import Estimate, estimate
from lora_lab.report.statistics.factorial import FactorialModel, factorial
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.trials import Trial, groups

OPTIMIZER = Factor(name="optimizer", keys=("optimizer",), levels=("adamw", "paged_adamw"))
PRECISION = Factor(name="precision", keys=("precision",), levels=("fp16", "bf16"))
SHAPE = Factor(name="shape", keys=("batch_size", "seq_len"), levels=("1x512", "2x512", "1x2048"))
FACTORS = [OPTIMIZER, PRECISION, SHAPE]
GRID = {factor.name: factor.levels for factor in FACTORS}
EFFECTS = {"optimizer=paged_adamw": 0.07, "precision=bf16": -0.05, "shape=2x512": 0.6, "shape=1x2048": 1.1}
MOSTLY = range(182, 200)
"""How often of 200 a 95 % interval may hold the truth: all but 0.6 % of binomial counts, to either side."""


def fit(trials: list[Trial]) -> FactorialModel:
    found = factorial(groups(trials)[0].measured, FACTORS, THROUGHPUT)
    assert isinstance(found, FactorialModel), found
    return found


def effect(model: FactorialModel, of: str) -> Estimate:
    (found,) = [effect.estimate for effect in model.effects if effect.of == of]
    return found


def holds(found: Estimate, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


PLANTED = {
    "nothing missing": ({}, 0),
    "trials missing": ({"missing": ["optimizer=paged_adamw precision=bf16 repeat=0", "shape=2x512 repeat=1"]}, 0),
    "cells missing": (
        {"missing": ["optimizer=paged_adamw precision=bf16 shape=2x512", "precision=fp16 shape=1x2048"]},
        1,
    ),
    "out of memory": ({"out_of_memory": ["optimizer=adamw shape=1x2048", "precision=bf16 shape=2x512 repeat=2"]}, 1),
}


@pytest.mark.parametrize(
    ("lost", "open_pairs"),
    some_by_day(PLANTED.values(), by_day=[PLANTED["trials missing"]]),
    ids=PLANTED.keys(),
)
def test_planted_effects_lie_in_95_of_100_intervals(lost, open_pairs):
    found = [fit(planted(GRID, EFFECTS, drift=0.2, random=seed, **lost)) for seed in range(200)]
    for words, truth in EFFECTS.items():
        level = words.split("=")[1]
        assert sum(holds(effect(model, level), truth) for model in found) in MOSTLY
        assert abs(sum(effect(model, level).value - truth for model in found) / 200) < 0.0015
    assert {len(model.not_estimable) for model in found} == {open_pairs}
    for number in range(3 - open_pairs):
        assert 200 - sum(model.interactions[number].p < 0.05 for model in found) in MOSTLY
    assert math.sqrt(sum(model.residual_sd**2 for model in found) / 200) == pytest.approx(0.01, rel=0.03)
    assert 200 - sum(model.lack_of_fit < 0.05 for model in found) in MOSTLY


@pytest.mark.nightly
def test_where_there_is_no_effect_one_in_twenty_intervals_says_there_is():
    found = [fit(planted(GRID, {"shape=2x512": 0.5}, drift=0.2, random=seed)) for seed in range(200)]
    assert 200 - sum(effect(model, "paged_adamw").seen is True for model in found) in MOSTLY


def test_a_difference_of_the_detectable_size_is_seen_four_times_in_five():
    grid = {name: GRID[name] for name in ("optimizer", "precision")}
    size = estimate(0.0, 0.01 * math.sqrt(4 / 8), 8 - 2 - 3).detectable  # two repeats: blocks, effects, interaction
    made = [fit(planted(grid, {"optimizer=paged_adamw": size}, repeats=2, random=seed)) for seed in range(300)]
    assert {model.df for model in made} == {3}
    assert 219 <= sum(effect(model, "paged_adamw").seen is True for model in made) <= 261  # three standard deviations


def test_an_interaction_is_found_with_its_size_and_the_effects_are_averages_over_the_grid():
    together = {"optimizer=paged_adamw shape=1x2048": 0.09, "optimizer=paged_adamw": 0.03}
    found = [fit(planted(GRID, together, drift=0.1, random=seed)) for seed in range(200)]
    assert sum(holds(effect(model, "paged_adamw"), 0.03 + 0.09 / 3) for model in found) in MOSTLY
    assert sum(holds(effect(model, "1x2048"), 0.09 / 2) for model in found) in MOSTLY
    pair = [next(each for each in model.interactions if each.factors == ("optimizer", "shape")) for model in found]
    assert all(each.p < 0.01 for each in pair)
    exact = fit(planted(GRID, together, noise=1e-7))
    by_pair = {each.factors: each for each in exact.interactions}
    shaped = by_pair["optimizer", "shape"]
    # 0.09 in one of six cells: less its row's mean of 0.03, its column's of 0.045, and with the whole's of 0.015
    assert shaped.largest == pytest.approx(0.09 - 0.03 - 0.045 + 0.015, abs=1e-5)
    assert shaped.at == ("paged_adamw", "1x2048")
    assert abs(by_pair["optimizer", "precision"].largest) < 1e-6


def test_three_factors_acting_together_show_as_lack_of_fit():
    together = {"optimizer=paged_adamw precision=bf16 shape=1x2048": 0.2}
    assert fit(planted(GRID, together, random=1)).lack_of_fit < 1e-6
    assert fit(planted(GRID, together, repeats=1, random=1)).lack_of_fit is None


def test_a_missing_cell_leaves_its_interactions_open_and_effects_that_add_up_are_still_right():
    missing = ["optimizer=paged_adamw shape=1x2048"]
    model = fit(planted(GRID, EFFECTS, noise=1e-6, missing=missing))
    assert model.not_estimable == ("optimizer x shape",)
    assert [each.factors for each in model.interactions] == [("optimizer", "precision"), ("precision", "shape")]
    assert effect(model, "paged_adamw").value == pytest.approx(0.07, abs=1e-5)
    assert effect(model, "1x2048").value == pytest.approx(1.1, abs=1e-5)


def test_of_two_interactions_that_stand_for_each_other_neither_is_taken():
    half = ["optimizer=adamw precision=fp16 shape=1x512", "optimizer=adamw precision=bf16 shape=2x512"]
    half += ["optimizer=paged_adamw precision=fp16 shape=2x512", "optimizer=paged_adamw precision=bf16 shape=1x512"]
    grid = {**GRID, "shape": ["1x512", "2x512"]}
    model = fit(planted(grid, EFFECTS, missing=half))  # each factor's effect is also that of the other two together
    assert model.interactions == ()
    assert model.not_estimable == ("optimizer x precision", "optimizer x shape", "precision x shape")


def test_factors_that_changed_together_are_named_in_place_of_a_fit():
    trials = planted(GRID, missing=["optimizer=adamw precision=bf16", "optimizer=paged_adamw precision=fp16"])
    said = factorial(trials, FACTORS, THROUGHPUT)
    assert isinstance(said, str)
    assert "optimizer, precision" in said
    assert "shape" not in said


def test_levels_that_ran_in_different_sweeps_are_named_in_place_of_a_fit():
    small = planted({**GRID, "shape": ["1x512"]}, sweep="monday")
    large = planted({**GRID, "shape": ["2x512"]}, sweep="friday")
    said = factorial(small + large, FACTORS, THROUGHPUT)
    assert isinstance(said, str)
    assert "shape" in said
    assert "sweep" in said
    assert "optimizer" not in said


def test_another_setting_that_differed_is_compared_within_and_never_across():
    whole = planted({**GRID, "vram_limit_gib": ["None"]}, EFFECTS, noise=1e-6)
    slower = planted({**GRID, "vram_limit_gib": ["8.0"]}, EFFECTS, noise=1e-6, base=50.0, missing=["optimizer=adamw"])
    model = fit(whole + slower)
    assert effect(model, "paged_adamw").value == pytest.approx(0.07, abs=1e-5)


def test_with_nothing_left_for_noise_the_interactions_go_first_and_then_the_fit():
    grid = {name: GRID[name] for name in ("optimizer", "precision")}
    model = fit(planted(grid, EFFECTS, repeats=1))
    assert (model.interactions, model.not_estimable, model.df) == ((), ("optimizer x precision",), 1)
    said = factorial(planted({"optimizer": OPTIMIZER.levels}, repeats=1), FACTORS, THROUGHPUT)
    assert isinstance(said, str)
    assert "repeats=5" in said


@pytest.mark.parametrize("trials", [[], planted({"optimizer": ["adamw"]}), planted(GRID, noise=0.0)])
def test_where_nothing_varied_there_is_a_reason(trials):
    assert isinstance(factorial(trials, FACTORS, THROUGHPUT), str)
    assert isinstance(factorial(trials, FACTORS, ENERGY), str)


def test_repeats_that_agree_to_the_last_digit_are_fitted_exactly_and_rounding_is_no_effect():
    effects = {"optimizer=paged_adamw": -0.1, "shape=1x2048": 0.5, "optimizer=paged_adamw shape=1x2048": 0.06}
    model = factorial(planted(GRID, effects, key=VRAM.key, base=6.23, noise=0.0), FACTORS, VRAM)
    assert isinstance(model, FactorialModel)
    assert (model.residual_sd, model.r_squared, model.lack_of_fit) == (0.0, 1.0, 1.0)
    assert effect(model, "paged_adamw").value == pytest.approx(-0.08)
    assert effect(model, "bf16").seen is False
    p = {each.factors: each.p for each in model.interactions}
    assert p == {("optimizer", "precision"): 1.0, ("optimizer", "shape"): 0.0, ("precision", "shape"): 1.0}


def test_losses_are_differences():
    losses = [
        trial(
            {LOSS.key: 1.5 + (precision == "bf16") / 4 + repeat + (repeat == 1) / 100},
            precision=precision,
            repeat=repeat,
        )
        for repeat in range(3)
        for precision in ("fp16", "bf16")
    ]
    model = factorial(losses, FACTORS, LOSS)
    assert isinstance(model, FactorialModel)
    assert effect(model, "bf16").value == pytest.approx(0.25)


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_neither_unit_nor_order_matters_and_swapping_the_baseline_turns_the_sign(seed, scale, order: random.Random):
    trials = planted(GRID, EFFECTS, noise=0.1, missing=["optimizer=adamw shape=2x512 repeat=1"], random=seed)
    before = fit(trials)
    trials = [dataclasses.replace(t, metrics={k: v * scale for k, v in t.metrics.items()}) for t in trials]
    order.shuffle(trials)
    turned = [dataclasses.replace(OPTIMIZER, levels=OPTIMIZER.levels[::-1]), SHAPE, PRECISION]
    after = factorial(trials, turned, THROUGHPUT)
    assert isinstance(after, FactorialModel)
    assert after.residual_sd == pytest.approx(before.residual_sd)
    assert after.lack_of_fit == pytest.approx(before.lack_of_fit)
    for level in ("bf16", "2x512", "1x2048"):
        assert dataclasses.astuple(effect(after, level)) == pytest.approx(dataclasses.astuple(effect(before, level)))
    assert effect(after, "adamw").value == pytest.approx(-effect(before, "paged_adamw").value)
    assert effect(after, "adamw").low == pytest.approx(-effect(before, "paged_adamw").high)
    there = {frozenset(each.factors): (each.f, each.p, abs(each.largest)) for each in before.interactions}
    back = {frozenset(each.factors): (each.f, each.p, abs(each.largest)) for each in after.interactions}
    assert all(back[pair] == pytest.approx(there[pair]) for pair in there)
