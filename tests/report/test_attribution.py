import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import factorial, trial
from scipy import stats
from statsmodels.regression.linear_model import OLS

from lora_lab.config import InvalidInput
from lora_lab.report.measures import LOSS, THROUGHPUT
from lora_lab.report.statistics.attribution import Split, split
from lora_lab.report.statistics.contrasts import contrasts
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.trials import groups

OPTIMIZER = Factor(name="optimizer", keys=("optimizer",), levels=("adamw", "paged_adamw"))
PRECISION = Factor(name="precision", keys=("precision",), levels=("fp16", "bf16"))
SHAPE = Factor(name="shape", keys=("batch_size", "seq_len"), levels=("1x512", "2x2048"))
METHOD = Factor(name="method", keys=("method",), levels=("qlora", "lora"))
FACTORS = [OPTIMIZER, PRECISION, SHAPE]
GRID = {factor.name: factor.levels for factor in FACTORS}
START = {"optimizer": "adamw", "precision": "fp16", "shape": "1x512"}
END = {"optimizer": "paged_adamw", "precision": "bf16", "shape": "2x2048"}
RUN_2 = {**END, "precision": "fp16"}
EFFECTS = {"optimizer=paged_adamw": 0.07, "precision=bf16": -0.03, "shape=2x2048": 1.2}
TOGETHER = {"optimizer=paged_adamw shape=2x2048": 0.10, "optimizer=paged_adamw precision=bf16 shape=2x2048": 0.06}
MOSTLY = range(182, 200)
"""How often of 200 a 95 % interval may hold the truth: all but 0.6 % of binomial counts, to either side."""


def parts(found: Split) -> dict[str, Estimate]:
    return {part.factor: part.estimate for part in found.parts if part.estimate is not None}


def holds(found: Estimate | None, truth: float) -> bool:
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


LOST = {
    "nothing missing": [],
    "trials missing": ["optimizer=adamw repeat=1", "shape=2x2048 precision=bf16 repeat=0"],
}


@pytest.mark.parametrize("missing", LOST.values(), ids=LOST.keys())
def test_planted_parts_lie_in_95_of_100_intervals(missing):
    found = [
        split(
            factorial(GRID, {**EFFECTS, **TOGETHER}, drift=0.2, missing=missing, random=seed),
            FACTORS,
            THROUGHPUT,
            START,
            END,
        )
        for seed in range(200)
    ]
    truth = {"optimizer": 0.07 + 0.05 + 0.02, "precision": -0.03 + 0.02, "shape": 1.2 + 0.05 + 0.02}
    for name, part in truth.items():
        assert sum(holds(parts(each)[name], part) for each in found) in MOSTLY
    assert sum(holds(each.total, sum(truth.values())) for each in found) in MOSTLY
    firsts = [part.first for each in found for part in each.parts if part.factor == "optimizer"]
    lasts = [part.last for each in found for part in each.parts if part.factor == "optimizer"]
    assert sum(holds(first, 0.07) for first in firsts) in MOSTLY
    assert sum(holds(last, 0.07 + 0.10 + 0.06) for last in lasts) in MOSTLY
    squares = sum(each.residual_sd**2 for each in found if each.residual_sd is not None)
    assert math.sqrt(squares / 200) == pytest.approx(0.01, rel=0.03)


UNEQUAL = {
    "the start": {("adamw", "1"): 0.1},
    "the first step": {("paged_adamw", "1"): 0.1},
    "one level": {("adamw", "1"): 0.05, ("adamw", "2"): 0.05},
}


@pytest.mark.parametrize("noisy", UNEQUAL.values(), ids=UNEQUAL.keys())
def test_parts_first_steps_and_last_ones_hold_where_corners_are_unequally_noisy(noisy):
    found = []
    for seed in range(200):
        draw = np.random.default_rng(seed)
        trials = factorial(
            {"optimizer": OPTIMIZER.levels, "shape": SHAPE.levels}, EFFECTS, noise=0.01, drift=0.2, random=seed
        )
        for one in trials:
            sd = noisy.get((one.params["optimizer"], one.params["batch_size"]), 0.0)
            one.metrics[THROUGHPUT.key] *= math.exp(sd * draw.standard_normal())
        found.append(split(trials, FACTORS, THROUGHPUT, START, RUN_2))
    coverage = {}
    for name, effect in (("optimizer", 0.07), ("shape", 1.2)):
        (of_factor,) = zip(*([part for part in each.parts if part.factor == name] for each in found), strict=True)
        for which in ("estimate", "first", "last"):
            coverage[name, which] = sum(holds(getattr(part, which), effect) for part in of_factor)
    assert min(coverage.values()) >= 175, (
        coverage
    )  # 87 %; by a common residual it is 80 % where the noisy corner counts
    assert sum(coverage.values()) >= 6 * 182


def test_the_interval_is_that_of_hc2_by_no_more_than_its_degrees_of_freedom():
    """statsmodels has the same standard error; the degrees of freedom lie between one and the residual's 14."""
    ratios = []
    for seed in range(40):
        trials = factorial(GRID, EFFECTS, random=seed)
        corners = [tuple(factor.level(each) for factor in FACTORS) for each in trials]
        names = sorted(set(corners))
        of_corners = np.array([[corner == name for name in names] for corner in corners], dtype=float)
        of_blocks = np.array([[each.repeat == repeat for repeat in (1, 2)] for each in trials], dtype=float)
        values = np.log([each.metrics[THROUGHPUT.key] for each in trials])
        fitted = OLS(values, np.hstack([of_corners, of_blocks])).fit(cov_type="HC2")
        weights = np.array([(name == tuple(END.values())) - float(name == tuple(START.values())) for name in names])
        tested = fitted.t_test(np.append(weights, [0.0, 0.0]))
        total = split(trials, FACTORS, THROUGHPUT, START, END).total
        assert total.value == pytest.approx(float(np.squeeze(tested.effect)))
        ratios.append((total.high - total.value) / float(np.squeeze(tested.sd)))
    assert min(ratios) >= stats.t.isf(0.025, 14) - 1e-9
    assert statistics.fmean(ratios) < stats.t.isf(0.025, 2)  # two corners of three repeats each


def test_a_corner_measured_once_counts_with_the_noise_of_the_others():
    grid = {"optimizer": OPTIMIZER.levels, "shape": SHAPE.levels}
    once = ["optimizer=paged_adamw shape=1x512 repeat=1", "optimizer=paged_adamw shape=1x512 repeat=2"]
    found = [
        split(factorial(grid, EFFECTS, drift=0.2, missing=once, random=seed), FACTORS, THROUGHPUT, START, RUN_2)
        for seed in range(200)
    ]
    firsts = [part.first for each in found for part in each.parts if part.factor == "optimizer"]
    assert sum(holds(first, 0.07) for first in firsts) >= 182
    assert sum(holds(parts(each)["optimizer"], 0.07) for each in found) >= 182


def test_a_factor_that_does_nothing_has_no_part_but_one_time_in_twenty():
    made = [factorial(GRID, {"shape=2x2048": 1.0}, drift=0.2, random=seed) for seed in range(200)]
    found = [split(trials, FACTORS, THROUGHPUT, START, RUN_2) for trials in made]
    assert 200 - sum(parts(each)["optimizer"].seen is True for each in found) in MOSTLY


def test_a_factor_that_did_not_change_has_no_estimate_and_its_other_levels_no_say():
    effects = {**EFFECTS, "precision=bf16": 5.0}
    found = split(factorial(GRID, effects, noise=0.0), FACTORS, THROUGHPUT, START, RUN_2)
    optimizer, precision, shape = found.parts
    assert (precision.of, precision.over, precision.estimate) == ("fp16", "fp16", None)
    assert optimizer.estimate.value == pytest.approx(0.07)
    assert shape.estimate.value == pytest.approx(1.2)
    assert found.trials == 12
    assert list(found.regimes) == ["adamw, 1x512", "paged_adamw, 1x512", "adamw, 2x2048", "paged_adamw, 2x2048"]
    assert list(found.corners.values()) == pytest.approx([0.0, 0.07, 1.2, 1.27])


def test_missing_corners_are_listed_and_the_total_still_stands():
    missing = ["optimizer=adamw shape=2x2048", "optimizer=paged_adamw precision=bf16 shape=1x512"]
    trials = factorial(GRID, EFFECTS, missing=missing, noise=1e-6, drift=0.3)
    found = split(trials, FACTORS, THROUGHPUT, START, END)
    assert found.parts == ()
    assert {tuple(point.values()) for point in found.missing} == {
        ("adamw", "fp16", "2x2048"),
        ("adamw", "bf16", "2x2048"),
        ("paged_adamw", "bf16", "1x512"),
    }
    assert found.total is not None
    assert found.total.value == pytest.approx(0.07 - 0.03 + 1.2, abs=1e-5)
    nowhere = split(trials, FACTORS, THROUGHPUT, START, {**RUN_2, "shape": "8x2048"})
    assert (nowhere.total, nowhere.parts) == (None, ())
    assert {"optimizer": "adamw", "precision": "fp16", "shape": "8x2048"} in nowhere.missing


def test_a_corner_out_of_memory_is_missing():
    trials = factorial(GRID, EFFECTS, out_of_memory=["optimizer=adamw shape=2x2048"])
    found = split(groups(trials)[0].measured, FACTORS, THROUGHPUT, START, RUN_2)
    assert found.missing == ({"optimizer": "adamw", "precision": "fp16", "shape": "2x2048"},)


def test_without_repeats_parts_have_no_interval_and_the_reason():
    found = split(factorial(GRID, EFFECTS, repeats=1, noise=0.0), FACTORS, THROUGHPUT, START, END)
    assert found.residual_sd is None
    for estimate in (found.total, *parts(found).values()):
        assert estimate.seen is None
        assert "repeats=5" in estimate.why_no_interval
    assert parts(found)["optimizer"].value == pytest.approx(0.07)


def test_points_of_different_sweeps_have_no_interval():
    one = factorial({"optimizer": ["adamw"], "shape": SHAPE.levels}, EFFECTS, noise=0.0, sweep="monday")
    two = factorial({"optimizer": ["paged_adamw"], "shape": SHAPE.levels}, EFFECTS, noise=0.0, sweep="friday")
    found = split(one + two, FACTORS, THROUGHPUT, START, RUN_2)
    assert "different sweeps" in found.total.why_no_interval
    assert found.total.seen is None
    assert parts(found)["optimizer"].value == pytest.approx(0.07)


def test_corners_are_alike_in_every_other_setting():
    whole = factorial({**GRID, "vram_limit_gib": ["None"]}, EFFECTS, noise=0.0)
    small = factorial(
        {**GRID, "vram_limit_gib": ["8.0"]}, EFFECTS, noise=0.0, base=50.0, repeats=9, missing=["shape=2x2048"]
    )
    found = split(small + whole, FACTORS, THROUGHPUT, START, END)
    assert found.missing == ()
    assert found.trials == 24
    assert found.total.value == pytest.approx(1.24)


def test_regimes_are_told_at_each_corner():
    regimes = {"shape=1x512": "host-bound", "shape=2x2048 repeat=0": "mixed"}
    found = split(
        factorial(GRID, EFFECTS, regimes=regimes), FACTORS, THROUGHPUT, {"shape": "1x512"}, {"shape": "2x2048"}
    )
    assert found.regimes == {"1x512": "host-bound", "2x2048": "mixed"}


def test_one_factor_alone_makes_the_whole():
    found = split(factorial(GRID, EFFECTS), FACTORS, THROUGHPUT, START, {**START, "shape": "2x2048"})
    part = found.parts[2]
    assert part.estimate == part.first == part.last == found.total


@given(st.integers(0, 10_000), st.sets(st.integers(0, 15), max_size=12))
@settings(max_examples=30)
def test_with_one_factor_the_total_is_the_paired_contrast_and_a_trial_without_its_like_has_no_say(seed, lost):
    words = [f"optimizer={level} repeat={repeat}" for level in OPTIMIZER.levels for repeat in range(8)]
    grid = {"optimizer": OPTIMIZER.levels}
    trials = factorial(grid, EFFECTS, drift=0.3, repeats=8, missing=[words[one] for one in lost], random=seed)
    found = split(trials, [OPTIMIZER], THROUGHPUT, {"optimizer": "adamw"}, {"optimizer": "paged_adamw"}).total
    paired = contrasts(trials, [OPTIMIZER], THROUGHPUT)
    if paired and found is not None:
        assert found.value == pytest.approx(paired[0].estimate.value, abs=1e-9)
        for name in ("low", "high", "detectable"):
            assert getattr(found, name) == pytest.approx(getattr(paired[0].estimate, name), abs=1e-9)
    else:
        assert found is None or found.low is None


def test_a_point_split_from_itself_is_no_difference():
    found = split(factorial(GRID, EFFECTS), FACTORS, THROUGHPUT, START, START)
    assert found.total.value == 0.0
    assert [part.estimate for part in found.parts] == [None, None, None]


def test_a_name_that_is_no_factor_is_refused_with_those_there_are():
    with pytest.raises(InvalidInput, match=r"optimiser.*optimizer, precision, shape"):
        split([], FACTORS, THROUGHPUT, {"optimiser": "adamw"}, {"shape": "2x2048"})


def test_losses_are_differences():
    losses = [
        trial({LOSS.key: 1.5 + (precision == "bf16") / 4 + repeat}, precision=precision, repeat=repeat)
        for repeat in range(2)
        for precision in ("fp16", "bf16")
    ]
    found = split(losses, [PRECISION], LOSS, {"precision": "fp16"}, {"precision": "bf16"})
    assert found.total.value == pytest.approx(0.25)


@st.composite
def cubes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of factorial(): four factors, all corners measured, some trials lost from some blocks."""
    words = [f"{name}={level}" for name, levels in GRID.items() for level in levels]
    gone = st.lists(st.sampled_from(words), min_size=1, max_size=3, unique=True).map(" ".join)
    later = st.sampled_from([" repeat=1", " repeat=2"])
    lost = draw(st.lists(st.builds("".join, st.tuples(gone, later)), max_size=3))
    return {
        "levels": {**GRID, "method": METHOD.levels},
        "effects": {**EFFECTS, **TOGETHER, "method=lora precision=bf16": 0.4},
        "noise": draw(st.sampled_from([0.0, 0.02, 0.5])),
        "drift": 0.2,
        "missing": lost,
        "random": draw(st.integers(0, 10_000)),
    }


@given(cubes(), st.sets(st.sampled_from(["optimizer", "precision", "shape", "method"]), min_size=1))
@settings(max_examples=40)
def test_parts_add_up_to_the_total_and_the_way_back_is_the_way_there_turned(cube, changed):
    trials = factorial(**cube)
    start, end = {**START, "method": "qlora"}, {**END, "method": "lora"}
    end = {name: (end if name in changed else start)[name] for name in start}
    found = split(trials, [*FACTORS, METHOD], THROUGHPUT, start, end)
    assert sum(part.value for part in parts(found).values()) == pytest.approx(found.total.value, abs=1e-9)
    back = split(trials[::-1], [METHOD, *FACTORS], THROUGHPUT, end, start)
    for name, part in parts(found).items():
        assert parts(back)[name].value == pytest.approx(-part.value, abs=1e-9)
        assert parts(back)[name].seen == part.seen
        if part.high is not None:
            assert parts(back)[name].low == pytest.approx(-part.high, abs=1e-9)
    there = {part.factor: part for part in found.parts}
    for part in back.parts:
        if part.first is not None:
            assert part.first.value == pytest.approx(-there[part.factor].last.value, abs=1e-9)


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_parts_are_the_mean_step_over_all_orders(seed):
    trials = factorial(GRID, {**EFFECTS, **TOGETHER}, noise=0.3, random=seed)
    found = split(trials, FACTORS, THROUGHPUT, START, END)

    def mean(point: dict[str, str]) -> float:
        there = [t for t in trials if all(factor.level(t) == point[factor.name] for factor in FACTORS)]
        return statistics.fmean(math.log(t.metrics[THROUGHPUT.key]) for t in there)

    steps: dict[str, list[float]] = {name: [] for name in START}
    for order in itertools.permutations(START):
        point = dict(START)
        for name in order:
            before = mean(point)
            point[name] = END[name]
            steps[name].append(mean(point) - before)
    for name, part in parts(found).items():
        assert part.value == pytest.approx(statistics.fmean(steps[name]), abs=1e-9)
