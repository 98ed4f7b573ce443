"""What a report says of trials of any kind: it always says something, and never more than it has."""

import dataclasses
import io
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import factorial, trial
from rich.console import Console

from lora_lab.outcome import Outcome
from lora_lab.report.answers.best.candidates import Wish
from lora_lab.report.answers.best.choice import choose
from lora_lab.report.answers.claims.study_file import shipped
from lora_lab.report.findings import Findings, Question, find
from lora_lab.report.measures import ENERGY, THROUGHPUT, VRAM
from lora_lab.report.writing.headline import best_point, sentences
from lora_lab.report.writing.page.page import page
from lora_lab.report.writing.terminal import show, show_full
from lora_lab.store.trials import Trial

LEVELS = {"optimizer": ["adamw", "paged_adamw"], "precision": ["fp16", "bf16"], "shape": ["1x512", "2x2048"]}


def found(trials: list[Trial]) -> Findings:
    return find(trials, [], Question(studies=tuple(shipped())), "0")


def said(findings: Findings, width: int = 100, full: bool = False) -> str:
    text = io.StringIO()
    (show_full if full else show)(findings, Console(file=text, width=width))
    return " ".join(text.getvalue().split())


OUTCOMES = ["finished"] * 2 + [outcome.value for outcome in Outcome]
RATE = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([math.nan, math.inf, 0.0]))
"""What a trial that diverged, or was too short, can have recorded."""
MEMORY = st.floats(0.5, 80)
FIGURES = st.fixed_dictionaries(
    {},
    optional={
        THROUGHPUT.key: RATE,
        ENERGY.key: RATE,
        "loss/eval": RATE,
        VRAM.key: MEMORY,
        "out_of_memory/asked_gib": MEMORY,
    },
)


@st.composite
def any_trial(draw: st.DrawFn) -> Trial:
    batch, seq = draw(st.sampled_from([("1", "512"), ("2", "512"), ("2", "2048")]))
    return trial(
        draw(FIGURES),
        outcome=draw(st.sampled_from(OUTCOMES)),
        sweep=draw(st.sampled_from([None, "one", "other"])),
        repeat=draw(st.integers(0, 1)),
        unit=draw(st.sampled_from(["GPU-1", "GPU-1", "GPU-2"])),
        regime=draw(st.sampled_from(["host-bound", "GPU-bound", "mixed", None])),
        validity=draw(st.sampled_from(["valid", "valid", "doubtful", "invalid", "unknown"])),
        optimizer=draw(st.sampled_from(["adamw", "paged_adamw"])),
        precision=draw(st.sampled_from(["fp16", "bf16"])),
        vram_limit_gib=draw(st.sampled_from(["None", "8.0"])),
        gradient_checkpointing="full",
        batch_size=batch,
        seq_len=seq,
    )


@settings(max_examples=settings().max_examples // 4)
@given(st.lists(any_trial(), min_size=1, max_size=12))
def test_any_trials_make_a_report_without_figures_that_are_none(trials: list[Trial]) -> None:
    findings = found(trials)
    text = said(findings)
    most = 5 if best_point(findings.groups[0]) else 8  # where nothing has figures, the reasons are listed
    assert 2 <= len(sentences(findings)) <= most
    assert not re.search(r"\(95 %|no interval", " ".join(sentences(findings)))
    assert not re.search(r"(nan|inf|None) ?(%|GiB|J|tokens)", text)
    page(findings, {})


def test_the_sentences_name_the_fastest_the_effects_and_the_regime() -> None:
    effects = {"optimizer=paged_adamw": math.log(0.9), "shape=2x2048": math.log(3)}
    regimes = {"shape=1x512": "host-bound"}
    findings = found(factorial(LEVELS, effects, noise=0.005, regimes=regimes, random=3))
    first, second, third, fourth, last = sentences(findings)
    assert re.search(r"adamw \w+ 2x2048 was the fastest of 8 configurations on NVIDIA H100", first)
    assert re.search(r"paged_adamw was \S+ % slower than adamw in host-bound trials and \S+ % slower in", second)
    assert "fp16" in third  # the shape says least, and comes last
    assert "host-bound" in fourth
    assert last.startswith("Use adamw")


def test_an_answer_about_four_points_fits_one_screen() -> None:
    levels = {"optimizer": ["adamw", "paged_adamw"], "shape": ["1x512", "2x2048"]}
    text = io.StringIO()
    show(found(factorial(levels, {"optimizer=paged_adamw": 0.1}, noise=0.01, random=1)), Console(file=text, width=100))
    assert 15 < len(text.getvalue().splitlines()) <= 36  # the page and its address take four more


def test_two_noisy_repeats_give_no_ratio_of_thousands() -> None:
    rates = {"adamw": (500.0, 90.0), "paged_adamw": (80.0, 520.0)}
    trials = [
        trial({THROUGHPUT.key: rate}, repeat=repeat, optimizer=optimizer)
        for optimizer, those in rates.items()
        for repeat, rate in enumerate(those)
    ]
    text = said(found(trials))
    assert "too noisy to compare with 2 repeats" in text
    assert "measure.steps" in text
    assert not re.search(r"x[\d,]{4,}|\d,\d{3},\d{3}", text)


def test_a_stand_in_is_compared_with_nothing_and_the_reason_is_given() -> None:
    plain = "paged optimizer state on a CPU is plain memory"
    trials = [
        trial(
            {THROUGHPUT.key: rate + repeat},
            repeat=repeat,
            optimizer=optimizer,
            batch_size=batch,
            tags={"stand_ins": plain if optimizer == "paged_adamw" else "none"},
        )
        for optimizer, batch, rate in (("adamw", "1", 500.0), ("paged_adamw", "1", 800.0), ("adamw", "2", 900.0))
        for repeat in range(3)
    ]
    findings = found(trials)
    for text in (said(findings), page(findings, {})):
        assert plain in text
        assert "paged_adamw was" not in text
        assert "paged_adamw over adamw" not in text
    assert "2x512 was" in said(findings)


@pytest.mark.nightly
def test_the_report_counts_all_ties_of_best() -> None:
    """Where both name the same point: by blocks another may be ahead of the one with the highest median.

    It may count more, because what it calls slower holds for all together."""
    ties = []
    for seed in range(12):
        trials = factorial(LEVELS, {"shape=2x2048": 0.02}, noise=0.01, drift=0.1, random=seed)
        [group] = found(trials).groups
        choice = choose(trials, Wish(objective=THROUGHPUT))
        fastest = max(group.points, key=lambda point: point.figures["throughput"][0])
        assert choice.best is not None
        if choice.best.trials[0] in fastest.trials:
            ties.append(group.as_fast)
            assert ties[-1] >= sum(runner.estimate.seen is False for runner in choice.runners_up)
    assert len(set(ties)) > 1


def test_what_changed_together_is_not_told_apart() -> None:
    trials = [trial({THROUGHPUT.key: 500.0}), trial({THROUGHPUT.key: 600.0}, optimizer="paged_adamw", precision="bf16")]
    findings = found(trials)
    assert "paged_adamw bf16 together was 20.0 % faster than adamw fp16" in sentences(findings)[1]
    assert "optimizer, precision" in said(findings)


def test_invalid_figures_are_left_out_of_every_number() -> None:
    good = [trial({THROUGHPUT.key: 500.0 + repeat}, repeat=repeat) for repeat in range(3)]
    bad = trial({THROUGHPUT.key: 9999.0}, repeat=3, validity="invalid", tags={"validity_reasons": "heat"})
    text = said(found([*good, bad]))
    assert "9,999" not in text
    assert "invalid: heat" in said(found([*good, bad]), full=True)


def test_an_engines_effect_is_found_in_every_regime() -> None:
    """Eager trials wait for their host; graph trials are what their busy share says."""
    levels = {"engine": ["eager", "graph"], "optimizer": ["adamw", "paged_adamw"]}
    for regime in ("host-bound", "GPU-bound"):
        regimes = {"engine=eager": "host-bound", "engine=graph": regime}
        trials = [
            dataclasses.replace(
                each,
                params={
                    **each.params,
                    "engine.kind": each.params["engine"],
                    "engine.chunked_loss": str(each.params["engine"] == "graph"),
                },
            )
            for each in factorial(levels, {"engine=graph": 0.9}, regimes=regimes)
        ]
        findings = found(trials)
        [group] = findings.groups
        assert [factor.name for factor in group.design.factors] == ["optimizer", "engine"]
        contrasts = [each for each in group.contrasts if each.factor == "engine" and each.measure is THROUGHPUT]
        assert contrasts
        assert "engine" in said(findings)
        assert "chunked_loss" not in said(findings)
        page(findings, {})
