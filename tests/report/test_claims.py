"""Verdicts on planted trials: who may speak, what decides, and how large an effect was needed."""

import dataclasses
import functools
import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import trial

from lora_lab.report.answers.claims.cells import ClaimSetting
from lora_lab.report.answers.claims.contrast import weigh
from lora_lab.report.answers.claims.judge import (
    CONFOUNDED,
    CONTRADICTED,
    NOT_TESTABLE,
    SUPPORTED,
    Verdict,
    decide,
    judge,
    load_study,
    needed,
)
from lora_lab.report.answers.claims.study import Change, ContrastClaim, Study
from lora_lab.report.answers.claims.study_file import SHIPPED
from lora_lab.report.measures import ENERGY, GPU_WORK, THROUGHPUT
from lora_lab.report.statistics.attribution import split
from lora_lab.report.statistics.differences import Difference
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.factors import design
from lora_lab.store.trials import Trial, groups

PAPER = SHIPPED / "arxiv_2509_12229.yaml"
CARD = "NVIDIA GeForce RTX 4060"
H100 = "NVIDIA H100 80GB HBM3"
DECIDED = (SUPPORTED, CONTRADICTED)


@functools.cache
def paper() -> Study:
    return load_study(PAPER)


def verdict(claim: str, trials: Sequence[Trial]) -> Verdict:
    return next(each for each in judge(paper(), groups(trials)) if each.claim == claim)


SHAPES = (("1", "512"), ("2", "1024"), ("2", "2048"))
"""Of the paper's three runs."""


def constant(_: float) -> float:
    return 100.0


def grid(
    effect: float = 0.0,
    precision: float = 0.0,
    *,
    noise: float = 0.01,
    repeats: int = 5,
    watts: Callable[[float], float] = constant,
    energy: bool = True,
    **told: Any,
) -> list[Trial]:
    """Optimizer x precision x shape, where paged_adamw multiplies tokens/s by exp(effect), bf16 by exp(precision)."""
    draw = random.Random(1)
    made = []
    for repeat, optimizer, dtype, (batch, seq) in itertools.product(
        range(repeats), ("adamw", "paged_adamw"), ("fp16", "bf16"), SHAPES
    ):
        log_rate = math.log(500.0 * int(batch) * (1.2 if seq == "1024" else 1.0)) + draw.gauss(0, noise)
        log_rate += effect * (optimizer == "paged_adamw") + precision * (dtype == "bf16")
        rate = math.exp(log_rate)
        metrics = {THROUGHPUT.key: rate} | ({ENERGY.key: watts(rate) / rate} if energy else {})
        levels = {"optimizer": optimizer, "precision": dtype, "batch_size": batch, "seq_len": seq}
        made.append(trial(metrics, repeat=repeat, gradient_checkpointing="full", **told, **levels))
    return made


def memory_trial(gib: float | None, **told: Any) -> Trial:
    """One at 1x2048 with full batches that peaked at `gib`; None ran out of memory."""
    before, spare = told.pop("before", None), told.pop("spare", 0.0)
    told = {"batch_size": "1", "seq_len": "2048", "data__batching": "seq_len", "method__raise_to_fp32": "False"} | told
    metrics = {"out_of_memory/asked_gib": 1.2} if gib is None else {"vram/peak_device_gib": gib}
    if gib is not None and spare:
        metrics |= {"vram/peak_reserved_gib": gib - 1, "vram/peak_allocated_gib": gib - 1 - spare}
    metrics |= {} if before is None else {"card/used_before_gib": before}
    outcome = "finished" if gib is not None else "out_of_memory"
    tags = {"device.memory_gib": told.pop("memory", "79.6")}
    return trial(metrics, outcome=outcome, tags=tags, gradient_checkpointing="full", **told)


# Who may speak


@settings(max_examples=12)
@given(
    effect=st.floats(-1, 1),
    precision=st.floats(-1, 1),
    where=st.sampled_from(
        [
            (H100, "host-bound"),
            (H100, "GPU-bound"),
            (CARD, "host-bound"),
            (CARD, "mixed"),
            (CARD, None),
            (f"{CARD} Ti", "GPU-bound"),
            (f"{CARD} Laptop GPU", "GPU-bound"),
        ]
    ),
)
def test_no_other_card_and_no_other_regime_can_speak_for_the_speed_of_this_card(
    effect: float, precision: float, where: tuple[str, str | None]
) -> None:
    trials = grid(effect, precision, repeats=2, device=where[0], regime=where[1])
    for claim in ("paged_adamw", "bf16"):
        found = verdict(claim, trials)
        assert found.verdict == CONFOUNDED
        assert found.seen, "what they show is listed all the same"
        assert CARD in found.why


@pytest.mark.parametrize(
    "other",
    [{"model": "smollm2_135m"}, {"method": "lora"}, {"gradient_checkpointing": "none"}],
    ids=["model", "method", "checkpointing"],
)
def test_trials_of_another_model_or_method_show_nothing(other: dict[str, str]) -> None:
    trials = [
        dataclasses.replace(each, params={**each.params, **other})
        for each in grid(0.2, device=CARD, regime="GPU-bound")
    ]
    assert all(not each.seen and each.verdict not in DECIDED for each in judge(paper(), groups(trials)))


def test_without_trials_nothing_is_decided() -> None:
    assert [each.verdict for each in judge(paper(), [])] == [CONFOUNDED, CONFOUNDED, NOT_TESTABLE, NOT_TESTABLE]


def test_evidence_of_others_is_listed_beside_that_of_the_card_and_changes_no_verdict() -> None:
    own = grid(0.2, device=CARD, regime="GPU-bound")
    other = grid(-0.5, device=H100, unit="GPU-2", regime="host-bound")
    found = verdict("paged_adamw", own + other)
    assert found.verdict == SUPPORTED
    assert {(seen.place.split(" (")[0], seen.regime) for seen in found.seen} == {
        (CARD, "GPU-bound"),
        (H100, "host-bound"),
    }
    by_regime = {seen.regime: set(seen.trials) for seen in found.seen}
    assert by_regime["GPU-bound"] == {each.run_id for each in own}
    assert by_regime["host-bound"] == {each.run_id for each in other}


def test_two_cards_of_the_same_name_that_disagree_decide_nothing() -> None:
    one, other = (grid(effect, device=CARD, unit=unit) for effect, unit in ((0.2, "GPU-1"), (-0.1, "GPU-2")))
    found = verdict("paged_adamw", one + other)
    assert found.verdict == CONFOUNDED
    assert "disagree" in found.why


# What decides: an effect


@settings(max_examples=15)
@given(effect=st.floats(-0.5, 0.5))
def test_an_owner_of_the_card_gets_the_verdict_that_the_effect_deserves(effect: float) -> None:
    found = verdict("paged_adamw", grid(effect, device=CARD))
    least = math.log(1.12)
    deserved = SUPPORTED if effect > least else CONTRADICTED
    assert found.verdict in ({deserved} if abs(effect - least) > 0.07 else {deserved, CONFOUNDED})
    estimate = found.seen[0].estimate
    assert estimate is not None
    assert abs(estimate.value - effect) < 0.02


@pytest.mark.parametrize(
    ("where", "word"),
    [
        ({"batch_size": "2", "seq_len": "2048", "precision": "fp16"}, SUPPORTED),  # run 2's own settings
        ({"batch_size": "1", "seq_len": "512", "precision": "fp16"}, SUPPORTED),  # run 1's
        ({"batch_size": "2", "seq_len": "1024", "precision": "bf16"}, CONFOUNDED),  # "up to" is not refuted by others
    ],
    ids=["run 2", "run 1", "neither"],
)
def test_up_to_is_not_contradicted_by_settings_where_it_does_nothing(where: dict[str, str], word: str) -> None:
    gains = {"optimizer": "paged_adamw"} | where
    trials = [
        dataclasses.replace(each, metrics={THROUGHPUT.key: each.metrics[THROUGHPUT.key] * 1.25})
        if gains.items() <= each.params.items()
        else each
        for each in grid(0.0, device=CARD)
    ]
    found = verdict("paged_adamw", trials)
    assert found.verdict == word
    assert "average of 6 settings" in found.why
    assert all(f"at run {run}'s settings" in found.why for run in (1, 2))
    assert verdict("paged_adamw", grid(0.0, device=CARD)).verdict == CONTRADICTED


def test_nothing_is_contradicted_where_a_run_of_the_claim_was_not_tried() -> None:
    trials = [each for each in grid(0.0, device=CARD) if each.params["seq_len"] != "2048"]
    found = verdict("paged_adamw", trials)
    assert found.verdict == CONFOUNDED
    assert "run 2's settings not among them" in found.why


def test_a_direction_is_judged_with_the_settings_of_the_runs_compared() -> None:
    own = [each for each in grid(precision=-0.1, device=CARD) if each.params["optimizer"] == "paged_adamw"]
    other = [each for each in grid(precision=0.14, device=CARD) if each.params["optimizer"] == "adamw"]
    assert verdict("bf16", own + other).verdict == SUPPORTED
    assert verdict("bf16", other).verdict == CONFOUNDED


def on_the_gpu(trials: list[Trial], work: float) -> list[Trial]:
    """The same trials, a third of whose time the GPU works; paged_adamw multiplies its work by exp(work)."""
    made = []
    for each in trials:
        factor = math.exp(work * (each.params["optimizer"] == "paged_adamw"))
        share = factor * each.metrics[THROUGHPUT.key] / 4000  # microseconds per token that do not depend on the host
        made.append(dataclasses.replace(each, metrics=each.metrics | {"throughput/gpu_busy_share": share}))
    return made


@pytest.mark.parametrize(
    ("device", "work", "word"),
    [
        (CARD, -math.log(1.25), SUPPORTED),
        (CARD, 0.0, CONTRADICTED),
        (CARD, -math.log(1.15), SUPPORTED),
        (H100, -math.log(1.25), CONFOUNDED),
    ],
)
def test_where_the_papers_card_waits_for_this_host_its_gpus_work_decides(device: str, work: float, word: str) -> None:
    """The host's own effect of -10 % on tokens/s decides nothing."""
    trials = on_the_gpu(grid(-0.1, noise=0.02, device=device, regime="host-bound"), work)
    found = verdict("paged_adamw", trials)
    assert found.verdict == word
    assert any(seen.text.split(": ")[1].startswith("GPU work") for seen in found.seen)


def test_a_stray_trial_does_not_hide_an_effect() -> None:
    trials = [each for each in grid(0.25, device=CARD) if each.params["seq_len"] != "1024"]
    stray = dataclasses.replace(
        trials[0], run_id="stray", params={**trials[0].params, "optimizer": "lion_8bit", "precision": "fp32"}
    )
    diagonal = [each for each in trials if each.params["precision"] == "fp16"]
    for told in (trials, diagonal):
        assert verdict("paged_adamw", [*told, stray]).verdict == SUPPORTED


def _share(word: str, effect: float, noise: float) -> float:
    """How often six settings of five pairs each, with this effect and noise, give the word."""
    claim = next(each for each in paper().claims if isinstance(each, ContrastClaim))
    draw = random.Random(7)

    def cell(*ends: str) -> ClaimSetting:
        pairs = {("sweep", repeat): draw.gauss(effect, noise) for repeat in range(5)}
        apart = Difference(value=statistics.fmean(pairs.values()), samples=(pairs,))
        return ClaimSetting(trials=(), regime="GPU-bound", difference=apart, ends=ends)

    told = [weigh(claim, claim.changes[0], [cell("1"), cell("2"), *(cell() for _ in range(4))]) for _ in range(300)]
    return told.count(word) / len(told)


@pytest.mark.parametrize("noise", [0.001, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_noise_makes_no_verdict_wrong(noise: float) -> None:
    """Short of the least (+6 % for 12 %) and at it; a share of 1 in 40 is allowed for, and chance."""
    assert _share(SUPPORTED, math.log(1.06), noise) < 0.05
    assert _share(SUPPORTED, math.log(1.119), noise) < 0.05
    assert _share(CONTRADICTED, math.log(1.25), noise) < 0.05
    assert _share(CONTRADICTED, math.log(1.121), noise) < 0.05


def test_little_noise_decides() -> None:
    assert _share(SUPPORTED, math.log(1.25), 0.02) > 0.95
    assert _share(CONTRADICTED, 0.0, 0.02) > 0.95


def test_too_noisy_to_see_the_claimed_effect_decides_nothing() -> None:
    found = verdict("paged_adamw", grid(0.05, noise=0.8, device=CARD))
    assert found.verdict == CONFOUNDED
    assert "could have been missed" in found.why


def test_single_trials_decide_nothing() -> None:
    trials = [each for each in grid(0.3, repeats=1, device=CARD) if each.params["precision"] == "fp16"]
    pair = [each for each in trials if (each.params["batch_size"], each.params["seq_len"]) == ("1", "512")]
    assert len(pair) == 2
    assert verdict("paged_adamw", pair).verdict == CONFOUNDED


def test_what_the_trials_themselves_cannot_tell_apart_decides_nothing() -> None:
    trials = [
        each
        for each in grid(0.2, device=CARD)
        if (each.params["optimizer"], each.params["precision"]) in (("adamw", "fp16"), ("paged_adamw", "bf16"))
    ]
    found = verdict("paged_adamw", trials)
    assert found.verdict == CONFOUNDED
    assert "no two trials of one repeat differ in optimizer alone" in found.seen[0].text


@pytest.mark.parametrize(
    ("precision", "watts", "word"),
    [
        (-0.1, constant, SUPPORTED),
        (0.1, constant, CONTRADICTED),
        (-0.1, lambda rate: rate * rate / 2500, CONTRADICTED),  # slower and thriftier
        (0.0, constant, CONFOUNDED),
    ],
)
def test_slower_and_hungrier_needs_both(precision: float, watts: Callable[[float], float], word: str) -> None:
    assert verdict("bf16", grid(precision=precision, noise=0.02, watts=watts, device=CARD)).verdict == word


def test_half_of_a_claim_without_figures_leaves_it_undecided() -> None:
    assert verdict("bf16", grid(precision=-0.1, energy=False, device=CARD)).verdict == CONFOUNDED


RATIOS = st.sampled_from([(1.25, 1.12), (1.25, 1.25), (0.8, 0.9), (0.8, 0.8)])


@given(st.floats(-1, 1), st.floats(0, 1), RATIOS)
def test_an_interval_that_holds_the_least_decides_nothing(
    value: float, reach: float, ratios: tuple[float, float]
) -> None:
    claimed = Change(measure=THROUGHPUT, sign=1 if ratios[0] > 1 else -1, ratio=ratios[0], least_ratio=ratios[1])
    found = Estimate(value=value, low=value - reach, high=value + reach)
    word = decide(claimed, found)
    if value - reach < math.log(ratios[1]) < value + reach:
        assert word is None
    if claimed.sign * value < 0:
        assert word != SUPPORTED
    mirrored = dataclasses.replace(claimed, sign=-claimed.sign, ratio=1 / ratios[0], least_ratio=1 / ratios[1])
    assert decide(mirrored, Estimate(value=-value, low=-value - reach, high=-value + reach)) == word


# What decides: memory

RUN_2 = {"optimizer": "paged_adamw", "batch_size": "2"}
"""What the study's run 2 has beside memory_trial's settings."""


@pytest.mark.parametrize(
    ("trials", "word"),
    [
        ([{"gib": 7.1}], SUPPORTED),
        ([{"gib": 8.3, "vram_limit_gib": "8.0"}], SUPPORTED),
        ([{"gib": 8.9, **RUN_2}], CONTRADICTED),
        ([{"gib": 8.9}], NOT_TESTABLE),  # that another run needs more says nothing of the study's
        ([{"gib": None, "vram_limit_gib": "8.0", **RUN_2}], CONTRADICTED),
        ([{"gib": None, "vram_limit_gib": "8.0"}], NOT_TESTABLE),
        ([{"gib": 7.1}, {"gib": 8.9, **RUN_2}], SUPPORTED),
        ([{"gib": 8.9, "spare": 2.0}, {"gib": 13.0, **RUN_2}], NOT_TESTABLE),  # torch's cache may be what is too much
        ([{"gib": None, "vram_limit_gib": "6.0"}], NOT_TESTABLE),
        ([{"gib": 7.1, "seq_len": "1024"}], NOT_TESTABLE),
        ([{"gib": 7.1, "data__batching": "longest"}], NOT_TESTABLE),
        ([{"gib": 7.9, "device": CARD, "memory": "8.0"}], SUPPORTED),
        ([{"gib": None, "device": CARD, "memory": "8.0", **RUN_2}], CONTRADICTED),
        ([{"gib": 7.1}, {"gib": None, "vram_limit_gib": "8.0", "batch_size": "2"}], SUPPORTED),
    ],
)
def test_whether_it_fits(trials: list[dict[str, Any]], word: str) -> None:
    assert verdict("seq_2048", [memory_trial(**told) for told in trials]).verdict == word


def test_full_batches_are_known_by_their_slots_where_they_were_counted() -> None:
    def slots(share: float) -> Trial:
        made = memory_trial(7.0, data__batching="longest")
        counted = {"throughput/slots_per_second": share * 4096, "throughput/steps_per_second": 2.0}
        return dataclasses.replace(made, metrics={**made.metrics, **counted})

    assert verdict("seq_2048", [slots(1.0)]).verdict == SUPPORTED
    assert verdict("seq_2048", [slots(0.3)]).verdict == NOT_TESTABLE


def test_seq_2048_fits_and_the_papers_own_run_does_not_and_both_are_said() -> None:
    own = {"optimizer": "paged_adamw", "precision": "fp16"}
    fits = memory_trial(8.29, before=0.47, vram_limit_gib="8.0", **own)
    raised = memory_trial(None, vram_limit_gib="8.0", method__raise_to_fp32="True", **own)
    run_2 = memory_trial(None, vram_limit_gib="8.0", batch_size="2", **own)
    found = verdict("seq_2048", [fits, raised, run_2])
    assert found.verdict == SUPPORTED
    assert found.words == "supported for another configuration"
    own = verdict("seq_2048", [memory_trial(7.1), memory_trial(7.8, **RUN_2)])
    assert own.words == "supported"
    lead = "at batch_size=1 with raise_to_fp32=False; the original's own run 2 (2x2048) did not fit as tried here."
    assert found.why.startswith(lead)
    assert "7.82 of 8 GiB, 0.18 GiB to spare" in found.why
    assert "An emulated limit is not" in found.why
    told = {seen.trials: seen.text for seen in found.seen}
    assert "fits into 8 GiB" in told[fits.run_id,]
    assert all("needs more" in told[each.run_id,] for each in (raised, run_2))
    assert "8.06 GB" in found.original


# What decides: an association


@pytest.mark.parametrize(
    ("power", "word"), [(0.0, SUPPORTED), (0.5, SUPPORTED), (1.5, CONTRADICTED)], ids=["constant", "grows", "soars"]
)
def test_energy_against_speed_is_judged_by_the_slope(power: float, word: str) -> None:
    found = verdict("faster_is_thriftier", grid(0.1, device=H100, regime="host-bound", watts=lambda rate: rate**power))
    assert found.verdict == word
    estimate = found.seen[0].estimate
    assert estimate is not None
    assert estimate.value == pytest.approx(power - 1, abs=0.02)
    assert "by definition" in found.original


def test_an_association_is_not_made_of_noise() -> None:
    """Energy a token is power / throughput: with one power, noise alone makes a slope of -1."""
    draw = random.Random(5)

    def same(repeat: int, **told: Any) -> Trial:
        rate = 500 * math.exp(draw.gauss(0, 0.03))
        metrics = {THROUGHPUT.key: rate, ENERGY.key: 100 / rate}
        return trial(metrics, repeat=repeat, gradient_checkpointing="full", **told)

    for _ in range(40):
        trials = [
            same(repeat, optimizer=optimizer, batch_size=batch, seq_len=seq)
            for repeat in range(3)
            for optimizer in ("adamw", "paged_adamw")
            for batch, seq in SHAPES
        ]
        found = verdict("faster_is_thriftier", trials)
        assert found.verdict == NOT_TESTABLE
        assert "too little compared with its noise" in found.why


def test_errors_that_both_measures_share_make_no_slope() -> None:
    """Energy a token does not change with the settings; an error in throughput is the opposite one in energy."""
    draw = random.Random(8)
    slopes = []
    for _ in range(40):
        trials = []
        for repeat, at in itertools.product(range(3), range(12)):
            error = draw.gauss(0, 0.035)
            metrics = {THROUGHPUT.key: 500 * math.exp(0.03 * at + error), ENERGY.key: 0.2 * math.exp(-error)}
            told: dict[str, Any] = {"gradient_checkpointing": "full", "seq_len": str(64 * (at + 1))}
            trials.append(trial(metrics, repeat=repeat, **told))
        seen = verdict("faster_is_thriftier", trials).seen[0]
        slopes.append(seen.estimate.value if seen.estimate is not None else 0.0)
    assert abs(statistics.fmean(slopes)) < 0.02


def test_an_association_is_said_to_be_one_case_and_where_nothing_was_told() -> None:
    draw = random.Random(6)
    told = grid(device=H100, regime="host-bound")
    flat = []
    for each in grid(device=H100, unit="GPU-2"):
        rate = 500 * math.exp(draw.gauss(0, 0.03))
        flat.append(dataclasses.replace(each, metrics={THROUGHPUT.key: rate, ENERGY.key: 100 / rate}))
    found = verdict("faster_is_thriftier", told + flat)
    assert found.verdict == SUPPORTED
    assert "This is one case" in found.why
    assert f"Undecided: {H100} (GPU-2), GPU-bound" in found.why
    assert "GPU-" not in verdict("faster_is_thriftier", told).why, "one card needs no UUID"


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ([(500, (0.19, 0.23)), (628, (0.151, 0.18)), (360, (0.26, 0.32))], "In all of its 3 runs"),
        ([(500, (0.19, 0.23)), (628, (0.151, 0.18)), (360, (0.26, 0.32))], "is 94.5 to 114 within 5 %"),
        ([(500, (0.2, 0.2)), (1000, (0.104, 0.104))], "is 102 within 5 %"),
        ([(500, (0.2, 0.2)), (1000, (0.106, 0.106))], ""),
        ([(500, (0.2, 0.2)), (1000, (0.1, 0.12))], ""),  # at one end alone
        ([(500, (0.2, 0.2)), (1000, (0.08, 0.1))], ""),
        ([(500, (0.2, 0.2)), (1000, None)], ""),
        ([(500, (0.2, 0.2)), (1000, None), (2000, (0.05, 0.05))], "In all of its 2 runs"),
    ],
)
def test_measures_whose_product_never_changes_follow_from_one_another(
    figures: list[tuple[float, tuple[float, float] | None]], said: str
) -> None:
    study = paper()
    runs = tuple(
        dataclasses.replace(run, figures={"throughput": (rate, rate)} | ({} if joules is None else {"energy": joules}))
        for run, (rate, joules) in zip(study.runs, figures, strict=False)
    )
    study = dataclasses.replace(study, runs=runs)
    claims = [claim for claim in study.claims if claim.id == "faster_is_thriftier"]
    [found] = judge(dataclasses.replace(study, claims=tuple(claims)), [])
    assert said in found.original
    assert ("follows from the other" in found.original) == bool(said)


def test_a_general_statement_falls_with_one_counterexample() -> None:
    one = grid(device=H100, regime="host-bound")
    other = grid(device=CARD, unit="GPU-2", watts=lambda rate: rate**1.5)
    found = verdict("faster_is_thriftier", one + other)
    assert found.verdict == CONTRADICTED
    assert f"Otherwise: {H100}, host-bound" in found.why


def test_without_relation_and_with_few_points_nothing_is_decided() -> None:
    draw = random.Random(2)
    loose = grid(watts=lambda rate: rate * math.exp(draw.gauss(0, 1)))
    assert verdict("faster_is_thriftier", loose).verdict == NOT_TESTABLE
    few = [each for each in grid() if each.params["seq_len"] == "1024" and each.params["precision"] == "fp16"]
    assert verdict("faster_is_thriftier", few).verdict == NOT_TESTABLE


# How large an effect was needed


def planted_split(shape_effect: float, regime: str, noise: float = 0.01) -> Any:
    draw = random.Random(3)
    trials = [
        trial(
            {
                measure.key: 500 * math.exp(shape_effect * (batch == "2") + draw.gauss(0, noise))
                for measure in (THROUGHPUT, ENERGY)
            },
            repeat=repeat,
            optimizer=optimizer,
            batch_size=batch,
            seq_len=seq,
            regime=regime,
        )
        for repeat in range(3)
        for optimizer in ("adamw", "paged_adamw")
        for batch, seq in (("1", "512"), ("2", "2048"))
    ]
    ends = [{"optimizer": "adamw", "shape": "1x512"}, {"optimizer": "paged_adamw", "shape": "2x2048"}]
    return lambda measure: split(trials, design(trials).factors, measure, *ends)


@settings(max_examples=10)
@given(shape_effect=st.floats(-1, 3))
def test_what_the_optimizer_would_have_had_to_do_is_what_the_shape_leaves(shape_effect: float) -> None:
    study = paper()
    found = needed(study, study.claims[0], [planted_split(shape_effect, "host-bound")(THROUGHPUT)])
    assert found is not None
    truth = math.log(628 / 500) - shape_effect
    assert found.estimate.value == pytest.approx(truth, abs=0.03)
    assert found.estimate.low is not None
    assert found.estimate.high is not None
    assert found.estimate.low < found.estimate.value < found.estimate.high
    assert found.step_ms == pytest.approx(1024)
    assert found.alone_ms == pytest.approx(208.7, abs=0.1)
    assert "does not transfer to" in found.text


def test_where_the_gpu_was_observed_its_own_work_is_the_evidence() -> None:
    """Host-bound, an eightfold step is eight times as many tokens/s; the GPU's work per token falls by a third."""
    trials = [
        trial(
            {THROUGHPUT.key: 500 * shape, "throughput/gpu_busy_share": 0.1 * shape * work * (1 + 0.001 * repeat)},
            repeat=repeat,
            optimizer=optimizer,
            batch_size=batch,
            seq_len=seq,
            regime="host-bound",
        )
        for repeat in range(3)
        for optimizer, own in (("adamw", 1.0), ("paged_adamw", 1.01))
        for batch, seq, shape, work in (("1", "512", 1, own), ("2", "2048", 8, own / 1.5))
    ]
    ends = [{"optimizer": "adamw", "shape": "1x512"}, {"optimizer": "paged_adamw", "shape": "2x2048"}]
    study, factors = paper(), design(trials).factors
    splits = [split(trials, factors, measure, *ends) for measure in (THROUGHPUT, GPU_WORK)]
    found = needed(study, study.claims[0], splits)
    assert found is not None
    assert found.by_gpu_work
    assert math.exp(found.others) == pytest.approx(1.5)
    assert found.own.ratio == pytest.approx(1 / 1.01)
    assert found.estimate.ratio == pytest.approx(628 / 500 / 1.5)
    by_rate = needed(study, study.claims[0], splits[:1])
    assert by_rate is not None
    assert not by_rate.by_gpu_work
    assert math.exp(by_rate.others) == pytest.approx(8)


def test_in_the_papers_regime_the_number_is_not_denied() -> None:
    study = paper()
    found = needed(study, study.claims[0], [planted_split(0.1, "GPU-bound")(THROUGHPUT)])
    assert found is not None
    assert found.regime == "GPU-bound"
    assert "cannot be carried" not in found.text
    assert "209 ms of run 1's step of 1,024 ms" in found.text


def test_other_measures_and_other_claims_need_no_effect() -> None:
    study = paper()
    made = planted_split(0.1, "GPU-bound")
    assert needed(study, study.claims[0], [made(ENERGY)]) is None
    assert all(needed(study, claim, [made(THROUGHPUT)]) is None for claim in study.claims[1:])
