"""What varied, and what of it can be told apart."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import trial

from lora_lab.config import InvalidInput
from lora_lab.report.statistics.factors import NO_EFFECT, TOKENS, design, tied
from lora_lab.store.trials import Sweep

PAPER = [
    {"optimizer": "adamw", "precision": "fp16", "batch_size": "1", "seq_len": "512"},
    {"optimizer": "paged_adamw", "precision": "fp16", "batch_size": "2", "seq_len": "2048"},
    {"optimizer": "paged_adamw", "precision": "bf16", "batch_size": "2", "seq_len": "1024"},
]
FACTORIAL = [
    {"optimizer": o, "precision": p, "batch_size": b, "seq_len": s}
    for o, p, b, s in itertools.product(("adamw", "paged_adamw"), ("fp16", "bf16"), "12", ("512", "1024", "2048"))
]


def sweep(**axes):
    params = {f"axis.{key.replace('__', '.')}": values for key, values in axes.items()}
    return Sweep(run_id="sweep0", name="sweep", outcome="finished", params=params, tags={}, started_ms=0)


def names(found):
    return [factor.name for factor in found.factors]


def levels(found):
    return {factor.name: factor.levels for factor in found.factors}


def parted(points):
    return {frozenset(group) for group in tied(points)}


def rank(points, names):
    """Of the main effects besides the mean."""
    seen = [sorted({point[name] for point in points}) for name in names]
    rows = [
        [1.0] + [float(point[name] == level) for name, told in zip(names, seen, strict=True) for level in told]
        for point in points
    ]
    return int(np.linalg.matrix_rank(np.array(rows))) - 1


@st.composite
def some_points(draw, most=4):
    """Points of two to four settings with two or three levels, many of the combinations missing."""
    counts = draw(st.lists(st.integers(2, 3), min_size=2, max_size=most))
    everything = list(itertools.product(*(range(count) for count in counts)))
    kept = draw(st.lists(st.sampled_from(everything), min_size=2, max_size=8))
    return [{f"s{at}": f"level{value}" for at, value in enumerate(point)} for point in kept]


# tied


def test_the_papers_three_runs_are_one_group():
    assert tied(PAPER) == [("optimizer", "precision", "batch_size", "seq_len", TOKENS)]


def test_a_full_factorial_leaves_only_the_tokens_a_step_open():
    assert tied(FACTORIAL) == [("batch_size", "seq_len", TOKENS)]


def test_two_pairs_of_opposites_are_two_groups_and_not_one():
    points = [{"a": a, "b": a, "c": c, "d": c, "e": e} for a, c, e in itertools.product("01", repeat=3)]
    assert tied(points) == [("a", "b"), ("c", "d")]


def test_a_product_that_stays_the_same_is_no_candidate():
    points = [{"batch_size": b, "seq_len": s} for b, s in (("1", "1024"), ("2", "512"), ("4", "256"))]
    assert tied(points) == [("batch_size", "seq_len")]


@pytest.mark.parametrize("points", [[], [{}], [{"a": "0"}], [{"a": "0"}, {"a": "0"}]])
def test_without_variation_nothing_is_tied(points):
    assert tied(points) == []


@given(some_points())
def test_the_groups_are_the_finest_whose_ranks_add_up(points):
    """Against the definition, tried on every way to part the settings."""
    varying = [name for name in points[0] if len({point[name] for point in points}) > 1]

    def partitions(items):
        if not items:
            yield []
            return
        for rest in partitions(items[1:]):
            yield [[items[0]], *rest]
            for at in range(len(rest)):
                yield [*rest[:at], [items[0], *rest[at]], *rest[at + 1 :]]

    whole = rank(points, varying)
    alone = {name: len({point[name] for point in points}) - 1 for name in varying}
    adding_up = [part for part in partitions(varying) if sum(rank(points, group) for group in part) == whole]
    finest = max(adding_up, key=len, default=[])
    assert parted(points) == {frozenset(group) for group in finest if len(group) > 1}
    for name in varying:
        others = [other for other in varying if other != name]
        estimable = whole - rank(points, others) == alone[name]
        assert estimable == all(name not in group for group in tied(points))


@given(some_points(), st.randoms(use_true_random=False))
def test_names_order_and_repeats_change_nothing(points, chance):
    swapped = {f"level{at}": f"level{to}" for at, to in enumerate(chance.sample(range(3), 3))}
    renamed = [{name: swapped[level] for name, level in point.items()} for point in points]
    shuffled = renamed + [dict(chance.choice(renamed)) for _ in range(3)]
    chance.shuffle(shuffled)
    assert parted(shuffled) == parted(points)


@given(some_points(), st.data())
def test_a_setting_with_pairs_all_else_equal_is_never_called_confounded(points, data):
    name = data.draw(st.sampled_from(sorted(points[0])))
    for level in {point[name] for point in points}:
        against = data.draw(st.sampled_from(points))
        points = [*points, against | {name: level}, against | {name: "reference"}]
    assert all(name not in group for group in tied(points))
    found = design([trial(**{f"data__{key}": value for key, value in point.items()}) for point in points])
    assert all(f"data.{name}" not in told.names for told in found.confounded)


# design


@given(
    some_points(most=3),
    st.lists(st.sampled_from([("1", "512"), ("2", "512"), ("1", "1024"), ("4", "256")]), min_size=8),
)
def test_what_remains_as_factors_can_be_told_apart(points, shapes):
    trials = [
        trial(batch_size=shape[0], seq_len=shape[1], **{f"data__{key}": value for key, value in point.items()})
        for point, shape in zip(points, shapes, strict=False)
    ]
    factors = design(trials).factors
    told = [{factor.name: factor.level(one) for factor in factors} for one in trials]
    assert rank(told, [factor.name for factor in factors]) == sum(len(factor.levels) - 1 for factor in factors)
    keys = [key for factor in factors for key in factor.keys]
    assert len(keys) == len(set(keys))


def test_the_papers_runs_as_trials():
    found = design([trial(repeat=repeat, **point) for point in PAPER for repeat in range(3)])
    (factor,) = found.factors
    assert factor.name == "optimizer + precision + shape"
    assert factor.levels[0] == "adamw + fp16 + 1x512"
    (told,) = found.confounded
    assert told.names == ("optimizer", "precision", "batch_size", "seq_len", TOKENS)
    assert "3 points cannot separate 4 settings" in told.why


def test_a_full_factorial_as_trials():
    trials = [trial(repeat=repeat, **point) for point in FACTORIAL for repeat in range(2)]
    random.Random(0).shuffle(trials)
    found = design(trials)
    assert names(found) == ["optimizer", "precision", "shape"]
    assert levels(found)["shape"] == ("1x512", "1x1024", "2x512", "1x2048", "2x1024", "2x2048")
    (told,) = found.confounded
    assert told.names == ("batch_size", "seq_len", TOKENS)
    assert told.why == "tokens per step is batch_size x seq_len"
    assert found.fixed["method"] == "qlora"
    assert not {"optimizer", "model.weights", "seed", "batch_size"} & set(found.fixed)


def test_shape_where_one_of_its_settings_varied():
    found = design([trial(batch_size=batch) for batch in ("8", "16", "2")])
    assert levels(found) == {"shape": ("2x512", "8x512", "16x512")}
    assert found.confounded[0].names == ("batch_size", TOKENS)
    assert found.confounded[0].why == "tokens per step is batch_size x 512"


def test_shape_with_accumulation():
    found = design([trial(batch_size=b, grad_accum_steps=a) for b, a in (("4", "1"), ("1", "4"), ("2", "1"))])
    assert levels(found) == {"shape": ("2x1x512", "1x4x512", "4x1x512")}
    assert found.confounded[0].names == ("batch_size", "grad_accum_steps", TOKENS)


def test_effects_that_add_up_are_not_enough_for_a_factor_of_shapes():
    """Main effects of batch and seq_len could be told here, but not those of the four shapes."""
    points = [("adamw", "1", "512"), ("adamw", "2", "512"), ("adamw", "1", "1024"), ("paged_adamw", "2", "1024")]
    found = design([trial(optimizer=o, batch_size=b, seq_len=s) for o, b, s in points])
    assert names(found) == ["optimizer + shape"]


def test_cells_without_figures_are_named_as_the_cause():
    out = {("adamw", "bf16"): "out_of_memory", ("paged_adamw", "fp16"): "out_of_memory"}
    grid = list(itertools.product(("adamw", "paged_adamw"), ("fp16", "bf16")))
    found = design([trial(optimizer=o, precision=p, outcome=out.get((o, p), "finished")) for o, p in grid])
    (told,) = found.confounded
    assert told.names == ("optimizer", "precision")
    assert told.why == (
        "with no figures at 2 of the 4 points tried, optimizer and precision changed together in every trial"
    )
    assert set(found.factors[0].levels) == {"adamw + fp16", "adamw + bf16", "paged_adamw + fp16", "paged_adamw + bf16"}
    assert names(design([trial(optimizer=o, precision=p) for o, p in grid])) == ["optimizer", "precision"]


def test_figures_that_are_invalid_tell_nothing_apart():
    points = list(itertools.product(("adamw", "paged_adamw"), ("fp16", "bf16")))
    trials = [trial(optimizer=o, precision=p, validity="invalid" if p == "bf16" else "valid") for o, p in points]
    found = design(trials)
    assert names(found) == ["optimizer", "precision"]
    assert found.notes == ("precision varied only among trials without figures: its effect is not known",)


def test_a_baseline_that_nobody_named_has_figures():
    found = design([trial(batch_size=b, outcome="out_of_memory" if b == "1" else "finished") for b in "124"])
    assert levels(found)["shape"] == ("2x512", "1x512", "4x512")


def test_a_merged_factor_starts_from_the_level_with_most_figures():
    often = [trial({"throughput/tokens_per_second": 1.0}, repeat=repeat, **PAPER[2]) for repeat in range(3)]
    once = [trial({"throughput/tokens_per_second": 1.0}, **point) for point in PAPER[:2]]
    [merged] = design(once + often).factors
    assert merged.levels[0] == "paged_adamw + bf16 + 2x1024"
    assert len(merged.levels) == 3


def test_a_factor_of_its_own_starts_from_its_first_level_however_often_others_ran():
    ran = [trial({"throughput/tokens_per_second": 1.0}, repeat=n, precision=p) for p, n in (("fp16", 0), ("bf16", 0))]
    more = [trial({"throughput/tokens_per_second": 1.0}, repeat=n, precision="fp16") for n in (1, 2)]
    [precision] = design(ran + more, [sweep(precision="bf16,fp16")]).factors
    assert precision.levels == ("bf16", "fp16")


def test_nothing_varied():
    assert design([trial(repeat=0), trial(repeat=1)]).factors == ()
    assert design([]).factors == ()


def test_what_changes_no_result_is_no_factor():
    assert {
        *(
            "seed",
            "repeat",
            "repeats",
            "resume",
            "tracking",
            "cluster",
            "plan",
            "timeout_minutes",
            "share_device",
            "cooldown_celsius",
        ),
        *(
            "measure.idle_seconds",
            "measure.board_power_watts",
            "measure.answers",
            "measure.general_rows",
            "measure.price_per_kwh",
            "measure.co2_grams_per_kwh",
        ),
        *("device", "capacity", "memory"),
        *("contrast", "margin", "budget_minutes", "first_pairs", "plan"),
    } == NO_EFFECT
    plain = {key.replace(".", "__"): "1" for key in NO_EFFECT - {"repeat"}}
    found = design([trial(tracking__root="here"), trial(tracking__root="there", **plain)])
    assert found.factors == ()


# Groups and what stands under them


def method(choice, quantization, rank, alpha="32.0", **more):
    return trial(method=choice, method__quantization=quantization, method__rank=rank, method__alpha=alpha, **more)


def test_a_groups_choice_stands_for_what_it_sets():
    found = design([method("lora", "none", "16"), method("qlora", "nf4", "16")])
    assert levels(found) == {"method": ("lora", "qlora")}


def test_a_setting_that_varies_within_a_choice_is_a_factor_of_its_own():
    grid = itertools.product((("lora", "none"), ("qlora", "nf4")), ("8", "16", "32"))
    found = design([method(*choice, rank) for choice, rank in grid])
    assert levels(found) == {"method": ("lora", "qlora"), "method.rank": ("8", "16", "32")}
    assert found.confounded == ()


def test_a_setting_that_varies_alone_keeps_its_key():
    assert names(design([method("qlora", "nf4", rank) for rank in ("8", "32")])) == ["method.rank"]


def test_settings_of_a_group_that_change_together_are_one():
    found = design([method("qlora", "nf4", rank, alpha=f"{2 * int(rank)}.0") for rank in ("8", "16", "32")])
    assert levels(found) == {"method.rank": ("8", "16", "32")}
    assert found.confounded == ()


# The order of levels, and the baseline


def test_levels_come_as_a_sweep_asked_for_them():
    trials = [
        trial(optimizer=o, learning_rate=r) for o in ("adamw", "paged_adamw") for r in ("1e-05", "0.0002", "5e-05")
    ]
    asked = sweep(learning_rate="5e-5,1e-5,2e-4", optimizer="paged_adamw,adamw")
    assert levels(design(trials, [asked])) == {
        "learning_rate": ("5e-05", "1e-05", "0.0002"),
        "optimizer": ("paged_adamw", "adamw"),
    }
    assert levels(design(trials)) == {
        "optimizer": ("adamw", "paged_adamw"),
        "learning_rate": ("1e-05", "5e-05", "0.0002"),
    }


def test_numbers_stand_by_size_where_no_sweep_names_them_all():
    trials = [method("qlora", "nf4", rank) for rank in ("128", "8", "16")]
    assert levels(design(trials, [sweep(method__rank="16,8")])) == {"method.rank": ("8", "16", "128")}


@pytest.mark.parametrize(
    ("baseline", "first"),
    [
        ({"optimizer": "paged_adamw"}, ["paged_adamw", "fp16", "1x512"]),
        ({"precision": "bf16", "batch_size": "2"}, ["adamw", "bf16", "2x512"]),
        ({"batch_size": "2", "seq_len": "2048"}, ["adamw", "fp16", "2x2048"]),
        ({"shape": "2x1024"}, ["adamw", "fp16", "2x1024"]),
        ({"method": "qlora"}, ["adamw", "fp16", "1x512"]),
    ],
)
def test_a_baseline_comes_first(baseline, first):
    asked = sweep(optimizer="adamw,paged_adamw", precision="fp16,bf16")
    found = design([trial(**point) for point in FACTORIAL], [asked], baseline)
    assert [factor.levels[0] for factor in found.factors] == first
    assert {len(factor.levels) for factor in found.factors} == {2, 6}


def test_a_baseline_reaches_into_a_merged_factor():
    found = design([trial(**point) for point in PAPER], baseline={"precision": "bf16"})
    assert found.factors[0].levels[0] == "paged_adamw + bf16 + 2x1024"


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ({"optimiser": "adamw"}, ["optimiser=adamw", "Did you mean optimizer?", "precision", "shape"]),
        ({"optimizer": "adamv"}, ["optimizer=adamv", "Did you mean adamw?", "paged_adamw"]),
        ({"shape": "4x512"}, ["shape=4x512", "2x512"]),
        ({"method": "lora"}, ["method=lora", "qlora"]),
        ({"optimizer.optim": "adamw_torch"}, ["this setting did not vary", "optimizer"]),
    ],
)
def test_a_baseline_that_is_not_there_is_refused(baseline, said):
    with pytest.raises(InvalidInput) as refused:
        design([trial(**point) for point in FACTORIAL], baseline=baseline)
    assert all(text in str(refused.value) for text in said)


def test_a_baseline_whose_parts_never_met_is_refused():
    with pytest.raises(InvalidInput, match=r"optimizer=adamw, precision=bf16: no trial has this combination"):
        design([trial(**point) for point in PAPER], baseline={"optimizer": "adamw", "precision": "bf16"})


@settings(max_examples=30)
@given(st.permutations(range(6)))
def test_the_order_of_trials_changes_nothing(order):
    trials = [trial(optimizer=o, batch_size=b) for o in ("adamw", "adamw_8bit") for b in "124"]
    assert design([trials[at] for at in order]) == design(trials)


# The engine, a group as any other


ENGINES = {"eager": ("eager", "False"), "compile": ("compile", "True"), "graph": ("graph", "True")}


def engine_trial(engine, chunked=None, **told):
    kind, loss = ENGINES[engine]
    told |= {"engine__kind": kind, "engine__chunked_loss": chunked or loss, "engine__lengths": "4"}
    return trial(engine=engine, **told)


@pytest.mark.parametrize("engines", [("eager", "compile"), ("eager", "compile", "graph")])
def test_an_engine_is_one_factor_and_what_it_sets_is_none(engines):
    trials = [engine_trial(e, optimizer=o) for e in engines for o in ("adamw", "paged_adamw")]
    found = design(trials, [sweep(engine=",".join(engines), optimizer="adamw,paged_adamw")])
    assert levels(found) == {"engine": engines, "optimizer": ("adamw", "paged_adamw")}
    assert found.confounded == ()
    assert design([engine_trial("graph", optimizer=o) for o in ("adamw", "paged_adamw")]).fixed["engine"] == "graph"


def test_a_chunked_loss_that_was_varied_by_itself_is_a_factor_of_its_own():
    found = design([engine_trial(e, chunked=c) for e in ("eager", "compile") for c in ("False", "True")])
    assert names(found) == ["engine", "engine.chunked_loss"]
