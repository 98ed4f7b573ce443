import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
from conftest import some_by_day
from hypothesis import given
from hypothesis import strategies as st
from planted import factorial, trial

from lora_lab.report.measures import ENERGY, LOSS, THROUGHPUT, VRAM
from lora_lab.report.statistics.averages import average
from lora_lab.report.statistics.blocks import figures
from lora_lab.report.statistics.contrasts import Contrast, contrasts
from lora_lab.report.statistics.estimates import Estimate, estimate
from lora_lab.report.statistics.factors import Factor
from lora_lab.report.statistics.pairs import paired_settings
from lora_lab.store.trials import Trial, groups

OPTIMIZER = Factor(name="optimizer", keys=("optimizer",), levels=("adamw", "paged_adamw"))
PRECISION = Factor(name="precision", keys=("precision",), levels=("fp16", "bf16"))
SHAPE = Factor(name="shape", keys=("batch_size", "seq_len"), levels=("1x512", "2x512"))
FACTORS = [OPTIMIZER, PRECISION, SHAPE]
GRID = {factor.name: factor.levels for factor in FACTORS}
SEVEN_PERCENT = math.log(1.07)
MOSTLY = range(182, 200)
"""How often of 200 a 95 % interval may hold the truth: all but 0.6 % of binomial counts, to either side."""
AT_LEAST = range(182, 201)
"""As often, and where the interval is wider than it need be: always."""


def optimizer_contrast(trials: list[Trial], of: str = "paged_adamw") -> Contrast:
    (found,) = [c for c in contrasts(measured(trials), FACTORS, THROUGHPUT) if c.factor == "optimizer" and c.of == of]
    return found


def measured(trials: list[Trial]) -> list[Trial]:
    return list(groups(trials)[0].measured)


def holds(contrast: Contrast, truth: float) -> bool:
    return within(contrast.estimate, truth)


def within(found: Estimate, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


PLANTED = {
    "nothing missing": {},
    "cells missing": {"missing": ["optimizer=paged_adamw precision=bf16 shape=2x512", "optimizer=adamw shape=1x512"]},
    "trials missing": {"missing": ["optimizer=paged_adamw precision=bf16 repeat=0", "shape=2x512 repeat=2"]},
    "out of memory": {"out_of_memory": ["optimizer=adamw shape=2x512"]},
    "one setting, a trial gone": {
        "missing": ["precision=bf16", "shape=2x512", "optimizer=adamw repeat=1"],
        "repeats": 4,
    },
}


@pytest.mark.parametrize(
    "lost",
    some_by_day(PLANTED.values(), by_day=[PLANTED["cells missing"], PLANTED["one setting, a trial gone"]]),
    ids=PLANTED.keys(),
)
def test_a_planted_effect_lies_in_95_of_100_intervals_whatever_is_missing_and_however_blocks_drift(lost):
    found = [
        optimizer_contrast(
            factorial(
                GRID, {"optimizer=paged_adamw": SEVEN_PERCENT, "shape=2x512": 0.6}, drift=0.2, random=seed, **lost
            )
        )
        for seed in range(200)
    ]
    conservative = any(each.cells > 1 and each.interval_over == "settings" for each in found)
    assert sum(within(each.this_session, SEVEN_PERCENT) for each in found) in (AT_LEAST if conservative else MOSTLY)
    assert sum(holds(each, SEVEN_PERCENT) for each in found) in AT_LEAST
    assert sum(each.estimate.seen is True for each in found) >= 190
    mean_error = sum(each.estimate.value - SEVEN_PERCENT for each in found) / 200
    assert abs(mean_error) < 0.0015  # noise of 1 % over 200 seeds; drift of 20 % would show


def unequal(noise: dict[str, float], repeats: dict[str, int], seed: int, blocks: float = 0.0) -> list[Trial]:
    """A sweep over optimizer and shape: each shape with its own noise and so many repeats, and with a standard
    deviation of `blocks` of what a block does to paged_adamw alone, whatever the shape."""
    draw = np.random.default_rng(seed)
    of_block = blocks * draw.standard_normal(9)
    return [
        trial(
            {
                THROUGHPUT.key: math.exp(
                    (optimizer == "paged_adamw") * (SEVEN_PERCENT + of_block[repeat]) + sd * draw.standard_normal()
                )
            },
            optimizer=optimizer,
            batch_size=shape,
            repeat=repeat,
        )
        for shape, sd in noise.items()
        for repeat in range(repeats.get(shape, 3))
        for optimizer in OPTIMIZER.levels
    ]


def unequal_contrasts(*args: Any, count: int = 200, **more: float) -> list[Contrast]:
    made = [contrasts(unequal(*args, seed, **more), [OPTIMIZER], THROUGHPUT) for seed in range(count)]
    return [contrast for (contrast,) in made]


UNEQUAL = {
    "interrupted": ([0.10, 0.06, 0.02, 0.004, 0.004, 0.004], {"0": 1, "1": 1, "2": 1}, "settings"),
    "3, 3 and 1 pairs": ([0.005, 0.005, 0.05], {"2": 1}, "settings"),
    "3 repeats, noise from 0.5 % to 10 %": (list(np.geomspace(0.005, 0.1, 6)), {}, "repeats"),
    "2 repeats, noise from 0.5 % to 10 %": (list(np.geomspace(0.005, 0.1, 6)), dict.fromkeys("012345", 2), "repeats"),
    "2 to 4 pairs, the fewer the noisier": ([0.05, 0.05, 0.01, 0.01], {"0": 2, "1": 2, "2": 4, "3": 4}, "repeats"),
}


@pytest.mark.parametrize(("noise", "repeats", "over"), UNEQUAL.values(), ids=UNEQUAL.keys())
def test_intervals_hold_where_settings_are_unequally_noisy_and_unequally_often_measured(noise, repeats, over):
    found = unequal_contrasts({str(number): sd for number, sd in enumerate(noise)}, repeats)
    assert sum(holds(each, SEVEN_PERCENT) for each in found) in AT_LEAST
    counted = [each.interval_over for each in found]
    assert counted.count(over) + counted.count("blocks") > 150


def test_one_noisy_setting_is_not_taken_for_noise_that_all_share():
    found = unequal_contrasts(dict.fromkeys("01234", 0.01) | {"5": 0.1}, {})
    coverage = sum(holds(each, SEVEN_PERCENT) for each in found)
    assert coverage >= 175  # 91 % is what two degrees of freedom, unknown beforehand, allow; by pooling it is 85 %


def test_where_noise_is_equal_settings_of_their_own_noise_cost_little_width():
    for cells, most in ((12, 1.1), (2, 1.35)):
        found = unequal_contrasts(dict.fromkeys(map(str, range(cells)), 0.01), {}, count=100)
        widths = sorted(each.this_session.high - each.this_session.value for each in found)
        known = estimate(0.0, 0.01 * math.sqrt(2 / 3 / cells), 2 * cells)
        assert widths[50] < most * known.high


@pytest.mark.nightly
def test_what_blocks_do_to_the_difference_itself_is_in_the_interval_for_sessions_like_it():
    noise = dict.fromkeys("01234567", 0.004)
    found = unequal_contrasts(noise, dict.fromkeys(noise, 4), blocks=0.03)
    assert sum(holds(each, SEVEN_PERCENT) for each in found) in MOSTLY
    assert sum(within(each.this_session, SEVEN_PERCENT) for each in found) < 130  # it is no interval for that
    assert {each.interval_over for each in found} == {"blocks"}


def test_what_is_claimed_for_sessions_like_it_is_never_narrower_than_for_this_one():
    found = unequal_contrasts(dict.fromkeys("012345", 0.01), {"5": 2})
    assert all(
        each.sessions_like_it.low <= each.this_session.low and each.this_session.high <= each.sessions_like_it.high
        for each in found
    )
    assert sum(within(each.this_session, SEVEN_PERCENT) for each in found) in MOSTLY
    assert sum(holds(each, SEVEN_PERCENT) for each in found) in AT_LEAST


def test_two_blocks_have_an_interval_for_this_session_alone():
    (found,) = unequal_contrasts({"0": 0.01, "1": 0.01}, {"0": 2, "1": 2}, count=1)
    assert found.sessions_like_it is None
    assert found.estimate == found.this_session


def by_blocks(trials: list[Trial]) -> Estimate:
    settings = paired_settings(figures(trials, THROUGHPUT), OPTIMIZER, "paged_adamw")
    found = average([setting.difference for setting in settings]).by_blocks
    assert found is not None
    return found


def test_sweeps_are_blocked_by_themselves_in_the_interval_over_blocks():
    noise = {"0": 0.01, "1": 0.01}
    one = unequal(noise, {}, 1)
    two = [
        dataclasses.replace(each, sweep="other", params=each.params | {"method": "lora"})
        for each in unequal(noise, dict.fromkeys(noise, 4), 2)
    ]
    reach = []
    for part in (one, two):
        alone = by_blocks(part)
        reach.append((alone.high - alone.value) / estimate(0.0, 1.0, len(part) / 4 - 1).high)
    both = by_blocks(one + two)
    shares = [each**2 / 4 for each in reach]
    df = sum(shares) ** 2 / (shares[0] ** 2 / 2 + shares[1] ** 2 / 3)
    expected = estimate(0.0, math.sqrt(sum(shares)), df).high
    assert both.high - both.value == pytest.approx(expected)


@pytest.mark.nightly
def test_where_there_is_no_effect_one_in_twenty_intervals_says_there_is():
    found = [
        optimizer_contrast(factorial(GRID, {"precision=bf16": 0.3}, drift=0.2, random=seed)) for seed in range(200)
    ]
    assert 200 - sum(each.this_session.seen is True for each in found) in MOSTLY
    assert sum(each.estimate.seen is True for each in found) <= 18  # the wider interval is wrong less often


@pytest.mark.parametrize("repeats", [2, 3, 6])
def test_a_difference_of_the_detectable_size_is_seen_four_times_in_five(repeats):
    grid = {"optimizer": OPTIMIZER.levels}
    true_error = 0.01 * math.sqrt(2 / repeats)
    planted = estimate(0.0, true_error, repeats - 1).detectable
    assert planted is not None
    seen = [
        optimizer_contrast(
            factorial(grid, {"optimizer=paged_adamw": planted}, repeats=repeats, random=seed)
        ).estimate.seen
        for seed in range(300)
    ]
    assert 219 <= sum(one is True for one in seen) <= 261  # 240, and three standard deviations


def test_an_effect_that_differs_by_setting_is_averaged_over_the_cells_and_its_range_is_told():
    effects = {"optimizer=paged_adamw": 0.02, "optimizer=paged_adamw shape=2x512": 0.10}
    trials = factorial(GRID, effects, noise=0.0, drift=0.1, missing=["precision=bf16 shape=2x512"])
    found = optimizer_contrast(trials)
    assert (found.cells, found.pairs) == (3, 9)
    assert found.estimate.value == pytest.approx((0.02 + 0.02 + 0.12) / 3)
    assert (found.lowest, found.highest) == (pytest.approx(0.02), pytest.approx(0.12))


def test_without_repeats_the_interval_is_over_settings_and_says_so():
    found = [
        optimizer_contrast(factorial(GRID, {"optimizer=paged_adamw": SEVEN_PERCENT}, repeats=1, random=seed))
        for seed in range(200)
    ]
    assert {each.interval_over for each in found} == {"settings"}
    assert sum(holds(each, SEVEN_PERCENT) for each in found) in MOSTLY
    spread = optimizer_contrast(factorial(GRID, {"optimizer=paged_adamw shape=2x512": 0.1}, repeats=1, noise=1e-6))
    assert spread.estimate.seen is False  # it is 0 in half of the settings and 0.1 in the others
    again = optimizer_contrast(factorial(GRID, {"optimizer=paged_adamw shape=2x512": 0.1}, repeats=3, noise=1e-6))
    assert again.interval_over != "settings"
    assert again.estimate.seen is True  # on this grid's average it is no chance


def test_one_pair_has_a_difference_and_no_interval():
    found = optimizer_contrast(factorial({"optimizer": OPTIMIZER.levels}, {"optimizer=paged_adamw": 0.1}, repeats=1))
    assert found.interval_over == "nothing"
    assert found.estimate.seen is None
    assert found.estimate.detectable is None
    assert "repeats=5" in found.estimate.why_no_interval


def test_regimes_are_told_apart_and_so_is_what_takes_trials_from_one_to_another():
    regimes = {"shape=1x512": "host-bound", "optimizer=adamw precision=bf16": "host-bound"}
    effects = {"optimizer=paged_adamw shape=1x512": 0.05, "optimizer=paged_adamw shape=2x512": 0.20}
    trials = factorial(GRID, effects, noise=0.0, regimes=regimes)
    found = contrasts(trials, [OPTIMIZER], THROUGHPUT)
    assert [(each.regime, each.cells, round(each.estimate.value, 6)) for each in found] == [
        ("host-bound", 2, 0.05),
        ("host-bound to GPU-bound", 1, 0.2),
        ("GPU-bound", 1, 0.2),
    ]


def test_a_cell_whose_repeats_disagree_is_mixed():
    regimes = {"optimizer=adamw repeat=0": "host-bound"}
    trials = factorial({"optimizer": OPTIMIZER.levels}, noise=0.0, repeats=2, regimes=regimes)
    assert [each.regime for each in contrasts(trials, [OPTIMIZER], THROUGHPUT)] == ["mixed"]


def test_trials_of_different_sweeps_are_never_paired():
    one = factorial({"optimizer": ["adamw"]}, base=500.0, sweep="monday")
    two = factorial({"optimizer": ["paged_adamw"]}, base=600.0, sweep="friday")
    assert contrasts(one + two, [OPTIMIZER], THROUGHPUT) == []


def test_trials_of_no_sweep_are_paired_in_their_order():
    slow, fast = ("adamw", 100.0), ("paged_adamw", 110.0)
    trials = [
        trial({THROUGHPUT.key: figure * day}, sweep=None, optimizer=optimizer)
        for day, order in ((1.0, (slow, fast)), (2.0, (fast, slow)), (4.0, (slow, fast)))
        for optimizer, figure in order
    ]
    found = optimizer_contrast(trials)
    assert found.pairs == 3
    assert (found.lowest, found.highest) == (pytest.approx(math.log(1.1)), pytest.approx(math.log(1.1)))
    assert found.estimate.low == pytest.approx(found.estimate.high)


def test_a_setting_that_differs_besides_is_no_pair_and_one_that_cannot_matter_is():
    def pairs(**besides: str) -> int:
        trials = [
            trial({THROUGHPUT.key: 100.0}, optimizer="adamw"),
            trial({THROUGHPUT.key: 110.0}, optimizer="paged_adamw", **besides),
        ]
        return sum(each.pairs for each in contrasts(trials, [OPTIMIZER], THROUGHPUT))

    assert pairs() == 1
    assert pairs(tracking="none", tracking__uri="x", timeout_minutes="5", resume="True", measure__idle_seconds="9") == 1
    assert pairs(method__rank="64") == 0
    assert pairs(vram_limit_gib="8.0") == 0
    assert pairs(measure__steps="12") == 0
    assert pairs(optimizer__args="{}") == 1  # paged_adamw's own


def test_a_setting_below_the_factors_own_group_that_varied_by_itself_is_kept_equal():
    trials = [
        trial({THROUGHPUT.key: figure}, optimizer=optimizer, optimizer__weight_decay=decay)
        for optimizer, decay, figure in (
            ("adamw", "0.0", 100.0),
            ("adamw", "0.1", 50.0),
            ("paged_adamw", "0.0", 110.0),
            ("paged_adamw", "0.1", 55.0),
        )
    ]
    found = optimizer_contrast(trials)
    assert (found.cells, found.pairs) == (2, 2)
    assert (found.lowest, found.highest) == (pytest.approx(math.log(1.1)), pytest.approx(math.log(1.1)))


def test_a_factor_by_its_leaf_is_paired_although_its_group_changes_with_it():
    leaf = Factor(name="precision.dtype", keys=("precision.dtype",), levels=("fp16", "bf16"))
    trials = factorial({"precision": PRECISION.levels}, {"precision=bf16": 0.1}, noise=0.0)
    (found,) = contrasts(trials, [leaf], THROUGHPUT)
    assert (found.of, found.pairs) == ("bf16", 3)


def test_what_ran_differently_besides_is_told_unless_the_factor_is_just_that():
    def made(kernel: str, **more: str) -> Trial:
        tags = {"ran.attention_kernel": kernel, "ran.optimizer_class": more["optimizer"], "stand_ins": "none"}
        return trial({THROUGHPUT.key: 100.0}, tags=tags, **more)

    changed = [made("cudnn", optimizer="adamw"), made("math", optimizer="paged_adamw")]
    assert optimizer_contrast(changed).also_changed == ("attention kernel: cudnn, math",)
    same = [made("math", optimizer="adamw"), made("math", optimizer="paged_adamw")]
    assert optimizer_contrast(same).also_changed == ()
    attention = Factor(name="attention", keys=("attention",), levels=("sdpa", "eager"))
    asked = [made("cudnn", optimizer="adamw", attention="sdpa"), made("math", optimizer="adamw", attention="eager")]
    assert contrasts(asked, [attention], THROUGHPUT)[0].also_changed == ()


def test_trials_without_the_figure_are_left_out_and_losses_are_differences():
    trials = factorial({"precision": PRECISION.levels}, noise=0.0)
    assert contrasts(trials, FACTORS, ENERGY) == []
    losses = [
        trial({LOSS.key: loss}, precision=precision, repeat=repeat, model__weights=weights)
        for repeat, weights in enumerate(["pretrained", "pretrained", "random"])
        for precision, loss in (("fp16", 1.5 + repeat), ("bf16", 1.75 + repeat))
    ]
    (found,) = contrasts(losses, FACTORS, LOSS)
    assert found.pairs == 2
    assert found.estimate.value == pytest.approx(0.25)


def test_repeats_that_agree_to_the_last_digit_give_an_exact_difference():
    peaks = {"optimizer=paged_adamw": math.log(0.9)}
    grid = {"optimizer": OPTIMIZER.levels, "precision": PRECISION.levels}
    trials = factorial(grid, peaks, key=VRAM.key, base=10.0, noise=0.0)
    optimizer, precision = contrasts(trials, FACTORS, VRAM)
    assert optimizer.estimate.seen is True
    assert precision.estimate.value == 0.0
    assert precision.estimate.seen is False


@st.composite
def sweeps(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of factorial(): a failure that printed its trials would be read by nobody."""
    words = [f"{name}={level}" for name, levels in GRID.items() for level in levels]
    gone = st.lists(st.sampled_from(words), min_size=2, max_size=3, unique=True).map(" ".join)
    repeat = st.integers(0, 2).map(lambda number: f" repeat={number}")
    lost = st.lists(st.builds("".join, st.tuples(gone, st.one_of(st.just(""), repeat))), max_size=3)
    noise, seed = draw(st.sampled_from([0.0, 0.01, 0.3])), draw(st.integers(0, 10_000))
    return {"effects": {words[1]: 0.3}, "noise": noise, "drift": 0.1, "missing": draw(lost), "random": seed}


def close(one: Contrast, other: Contrast) -> bool:
    pairs = [
        (getattr(one.estimate, name), getattr(other.estimate, name)) for name in ("value", "low", "high", "detectable")
    ]
    pairs += [(one.lowest, other.lowest), (one.highest, other.highest)]
    same = (one.factor, one.of, one.regime, one.pairs, one.cells) == (
        other.factor,
        other.of,
        other.regime,
        other.pairs,
        other.cells,
    )
    return same and all(a == b or math.isclose(a, b, abs_tol=1e-9) for a, b in pairs)


@given(sweeps())
def test_swapping_the_sides_turns_the_sign(sweep):
    trials = factorial(GRID, **sweep)
    turned = Factor(name="optimizer", keys=("optimizer",), levels=("paged_adamw", "adamw"))
    there = contrasts(trials, [OPTIMIZER], THROUGHPUT)
    back = contrasts(trials, [turned], THROUGHPUT)
    assert len(there) == len(back)
    for one, other in zip(there, back, strict=True):
        assert (one.of, one.over) == (other.over, other.of)
        assert one.estimate.value == pytest.approx(-other.estimate.value, abs=1e-9)
        if one.estimate.low is not None:
            assert one.estimate.low == pytest.approx(-other.estimate.high, abs=1e-9)
            assert one.estimate.detectable == pytest.approx(other.estimate.detectable, abs=1e-9)


@given(sweeps(), st.floats(1e-6, 1e6), st.randoms(use_true_random=False))
def test_neither_the_unit_nor_the_order_of_trials_matters(sweep, scale, order: random.Random):
    trials = factorial(GRID, **sweep)
    before = contrasts(trials, FACTORS, THROUGHPUT)
    scaled = [dataclasses.replace(t, metrics={k: v * scale for k, v in t.metrics.items()}) for t in trials]
    order.shuffle(scaled)
    after = contrasts(scaled, FACTORS, THROUGHPUT)
    assert len(before) == len(after)
    assert all(close(one, other) for one, other in zip(before, after, strict=True))
