"""The answer to a contrast, from pairs of trials and a rule that was fixed before them."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_lab.comparison.judge import Answer, Run, Verdict, judge
from lora_lab.comparison.rule import GPU_BUSY_SHARE, TOKENS_PER_SECOND, Contrast, Rule
from lora_lab.comparison.words import sentences
from lora_lab.report.measures import GPU_WORK
from lora_lab.store.trials import Trial


def rule_for(*names: str, margin: float = 1.0) -> Rule:
    """A rule with a contrast of a point NAME0 with NAME1 for each name."""
    contrasts = tuple(
        Contrast(key=name, over=f"{name}0", of=f"{name}1", over_points=(f"{name}0",), of_points=(f"{name}1",))
        for name in names
    )
    return Rule(contrasts=contrasts, margin_percent=margin, budget_minutes=10.0, first_pairs=5)


def run(block: int, point: str, speed: float = 100.0, outcome: str = "finished", **tags: str) -> Run:
    metrics = {TOKENS_PER_SECOND: speed} if outcome == "finished" else {}
    return Run(block=block, point=point, outcome=outcome, reason="no room", tags=tags, metrics=metrics)


def pairs(name: str, changes: Sequence[float]) -> list[Run]:
    """Pairs whose differences of logarithms are `changes`."""
    return [
        each
        for block, change in enumerate(changes)
        for each in (run(block, f"{name}0"), run(block, f"{name}1", 100 * math.exp(change)))
    ]


def judged(changes: Sequence[float], margin: float = 1.0) -> Verdict:
    [verdict] = judge(rule_for("x", margin=margin), pairs("x", changes))
    return verdict


CHANGES = st.lists(st.floats(-0.05, 0.05), max_size=30)


@given(changes=CHANGES, later=CHANGES)
def test_what_is_settled_stays_so_whatever_is_run_later(changes: list[float], later: list[float]) -> None:
    """So a kill at any time and a resume end with the same answer, from the same pairs."""
    verdict = judged(changes)
    if verdict.answer is not Answer.unsettled:
        assert judged([*changes, *later]) == judged(changes[: verdict.pairs]) == verdict


@given(changes=CHANGES, order=st.randoms())
def test_the_order_in_which_trials_are_read_does_not_matter(changes: list[float], order: object) -> None:
    runs = pairs("x", changes)
    shuffled = sorted(runs, key=lambda _: order.random())  # type: ignore[attr-defined]
    assert judge(rule_for("x"), shuffled) == judge(rule_for("x"), runs)


@given(changes=CHANGES, margin=st.floats(0.1, 5), wider=st.floats(1, 5))
def test_what_is_equivalent_is_so_within_any_wider_margin_and_no_later(
    changes: list[float], margin: float, wider: float
) -> None:
    narrow, wide = judged(changes, margin), judged(changes, margin * wider)
    if narrow.answer is Answer.equivalent:
        assert wide.answer is Answer.equivalent
        assert wide.pairs <= narrow.pairs


@given(changes=CHANGES, margin=st.floats(0.1, 5))
def test_an_answer_is_what_its_interval_says(changes: list[float], margin: float) -> None:
    verdict = judged(changes, margin)
    if verdict.change is None:
        assert len(changes) < 2
        return
    low, high, beyond = verdict.change.low, verdict.change.high, math.log1p(margin / 100) * (1 + 1e-9)
    assert low <= verdict.change.value <= high
    if verdict.answer is Answer.equivalent:
        assert -beyond <= low
        assert high <= beyond
    assert (verdict.answer is not Answer.faster) or low > 0
    assert (verdict.answer is not Answer.slower) or high < 0
    assert (verdict.answer is Answer.unsettled) == (verdict.more_pairs > 0)


def test_the_first_look_is_at_half_the_level_and_has_students_interval() -> None:
    changes = [-0.030, -0.028, -0.031, -0.029, -0.033]
    verdict = judged(changes)
    assert (verdict.answer, verdict.pairs) == (Answer.slower, 5)
    low, high = stats.t.interval(0.975, 4, np.mean(changes), stats.sem(changes))
    assert verdict.change is not None
    assert (verdict.change.low, verdict.change.high) == pytest.approx((low, high))
    near = judged([0.001, -0.002, 0.0, 0.003, -0.001])
    low, high = stats.t.interval(0.95, 4, 0.0002, stats.sem([0.001, -0.002, 0.0, 0.003, -0.001]))
    assert near.answer is Answer.equivalent
    assert near.change is not None
    assert (near.change.low, near.change.high) == pytest.approx((low, high))


def test_all_looks_together_spend_no_more_than_the_level() -> None:
    looks = rule_for("x").looks()
    seen = [next(looks) for _ in range(20)]
    assert [count for count, _ in seen[:5]] == [5, 8, 12, 18, 27]
    assert 0.0499 < sum(level for _, level in seen) <= 0.05


def test_false_answers_are_rarer_than_stated_and_five_pairs_are_usual_where_noise_is_small() -> None:
    """Pairs of 0.8 % and of 0.5 % within a margin of 1 %; 300 sweeps each. docs/sweeps.md has 2,000."""
    rng, margin = np.random.default_rng(3), math.log1p(0.01)

    def sweeps(effect: float, sd: float) -> list[Verdict]:
        return [judged(list(rng.normal(effect, sd, 60))) for _ in range(300)]

    none, at_margin, small = sweeps(0.0, 0.008), sweeps(margin, 0.008), sweeps(0.0, 0.005)
    changed = sum(each.answer in (Answer.faster, Answer.slower) for each in none)
    assert 0 < changed <= 15, "of 300; 6 are expected"
    assert 2 <= sum(each.answer is Answer.equivalent for each in at_margin) <= 18, "9 are expected"
    assert 5.2 < np.mean([each.pairs for each in small]) < 6.2
    assert all(each.answer is not Answer.unsettled for each in [*none, *small])


def test_of_several_contrasts_each_is_judged_as_holm_does() -> None:
    """The second is beyond noise at the look's own level of 2.5 %, not at half of that."""
    clear, faint = [0.030, 0.031, 0.029, 0.030, 0.032], [0.017, 0.032, 0.008, 0.026, 0.011]
    assert 0.0125 < stats.ttest_1samp(faint, 0).pvalue < 0.025
    [_, with_clear] = judge(rule_for("a", "b"), [*pairs("a", clear), *pairs("b", faint)])
    [_, with_faint] = judge(rule_for("a", "b"), [*pairs("a", faint), *pairs("b", faint)])
    assert with_clear.answer is Answer.faster
    assert with_faint.answer is Answer.unsettled


def test_a_pair_of_several_settings_counts_once_with_its_mean() -> None:
    contrast = Contrast(key="x", over="x0", of="x1", over_points=("a0", "b0"), of_points=("a1", "b1"))
    rule = replace(rule_for("x"), contrasts=(contrast,))
    steps = [0.0, 0.001, 0.002, -0.001, 0.001]
    [verdict] = judge(rule, [*pairs("a", [0.02 + s for s in steps]), *pairs("b", [0.04 - s for s in steps])])
    assert (verdict.answer, verdict.pairs) == (Answer.faster, 5)
    assert verdict.change is not None
    assert verdict.change.value == pytest.approx(0.03)
    assert verdict.by_setting == pytest.approx((0.0206, 0.0394))
    assert "on average over 2 settings (+2.1 to +4.0 % by setting)" in sentences(rule, [verdict])[0]


@pytest.mark.parametrize(("other", "answer"), [(0.08, Answer.mixed), (0.005, Answer.equivalent)])
def test_settings_that_differ_beyond_the_margin_are_not_equivalent_for_cancelling_out(
    other: float, answer: Answer
) -> None:
    contrast = Contrast(key="x", over="x0", of="x1", over_points=("a0", "b0"), of_points=("a1", "b1"))
    rule = replace(rule_for("x"), contrasts=(contrast,))
    steps = [0.0, 0.001, 0.002, -0.001, 0.001]
    runs = [*pairs("a", [other + s for s in steps]), *pairs("b", [-other + s for s in steps])]
    [verdict] = judge(rule, runs)
    assert (verdict.answer, verdict.pairs) == (answer, 5)
    line, _ = sentences(rule, [verdict])
    assert ("are equivalent" in line) == (answer is Answer.equivalent)
    assert "on average over 2 settings" in line


def test_a_pair_with_a_side_that_failed_or_is_invalid_does_not_count() -> None:
    runs = pairs("x", [-0.030, -0.028, -0.031, -0.029, -0.033, -0.030, -0.030])
    spoilt = [
        replace(each, outcome="out_of_memory", metrics={})
        if (each.block, each.point) == (0, "x1")
        else replace(each, tags={"validity": "invalid"})
        if (each.block, each.point) == (3, "x0")
        else each
        for each in runs
    ]
    [verdict] = judge(rule_for("x"), spoilt)
    assert (verdict.answer, verdict.pairs) == (Answer.slower, 5)
    [verdict] = judge(rule_for("x"), spoilt[:-2])
    assert (verdict.answer, verdict.pairs, verdict.more_pairs) == (Answer.unsettled, 4, 1)


def test_a_level_that_fails_twice_in_a_row_cannot_be_compared() -> None:
    failing = [run(0, "x0"), run(0, "x1", outcome="out_of_memory"), run(1, "x0"), run(1, "x1", outcome="out_of_memory")]
    rule = rule_for("x")
    [verdict] = judge(rule, failing)
    assert verdict.answer is Answer.incomparable
    [line] = sentences(rule, [verdict])
    assert "cannot be compared: x1" in line
    assert "out of memory: no room" in line
    [once] = judge(rule, failing[:2])
    killed = [replace(each, outcome="killed") if each.outcome == "out_of_memory" else each for each in failing]
    [interrupted] = judge(rule, killed)
    assert once.answer is interrupted.answer is Answer.unsettled


def test_the_one_setting_that_fails_is_named() -> None:
    """Where batch 8 does not fit, batch 1 could still be compared."""
    contrast = Contrast(key="x", over="x0", of="x1", over_points=("a0", "b0"), of_points=("a1", "b1"))
    rule = replace(rule_for("x"), contrasts=(contrast,))
    runs = [*pairs("a", [0.0, 0.001]), *(run(block, "b0") for block in (0, 1))]
    failing = [replace(run(block, "b1", outcome="out_of_memory"), name="x1 8x512") for block in (0, 1)]
    [verdict] = judge(rule, [*runs, *failing])
    assert verdict.answer is Answer.incomparable
    assert "x1 8x512 (out of memory: no room)" in verdict.why
    assert "leave that value out" in verdict.why


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        ({"tags": {"validity": "invalid", "validity_reasons": "another process"}}, "invalid: another process"),
        ({"metrics": {}, "tags": {f"absent.{TOKENS_PER_SECOND}": "no window"}}, "no window"),
        ({"metrics": {TOKENS_PER_SECOND: math.nan}}, "nan tokens/s"),
        ({"metrics": {TOKENS_PER_SECOND: 0.0}}, "0 tokens/s"),
    ],
)
def test_a_level_without_figures_that_count_twice_in_a_row_cannot_be_compared(
    spoilt: dict[str, object], why: str
) -> None:
    rule, runs = rule_for("x"), pairs("x", [-0.030, -0.028, -0.031])
    bad = [replace(each, **spoilt) if each.point == "x1" and each.block else each for each in runs]  # type: ignore[arg-type]
    [once], [twice] = judge(rule, bad[:4]), judge(rule, bad)
    assert (once.answer, once.uncounted, once.why_uncounted) == (Answer.unsettled, 1, why)
    assert (twice.answer, twice.pairs) == (Answer.incomparable, 1)
    assert why in twice.why
    killed = replace(run(2, "x1", outcome="killed"), reason="signal 9")
    [passed_over] = judge(rule, [*bad[:4], run(2, "x0"), killed])
    assert passed_over.answer is Answer.unsettled
    [line] = sentences(rule, [passed_over])
    assert "1 pair (2 more did not count" in line
    assert "killed: signal 9" in line
    [after_it] = judge(rule, [*bad[:4], run(2, "x0"), killed, run(3, "x0"), replace(bad[3], block=3)])
    assert after_it.answer is Answer.incomparable


def test_pairs_that_do_not_count_after_the_answer_do_not_change_it() -> None:
    runs = pairs("x", [-0.030, -0.028, -0.031, -0.029, -0.033, -0.030, -0.030])
    bad = [replace(each, tags={"validity": "invalid"}) if each.block in (1, 6) else each for each in runs]
    [verdict] = judge(rule_for("x"), bad)
    assert (verdict.answer, verdict.pairs, verdict.uncounted) == (Answer.slower, 5, 1)
    assert judge(rule_for("x"), bad[:12]) == (verdict,)


def test_a_stand_in_on_one_side_cannot_be_compared_however_clear_the_figures_are() -> None:
    """fp16 on a CPU runs in fp32: its figures say nothing of fp16."""

    def standing(**which: str) -> Verdict:
        runs = pairs("x", [0.030, 0.031, 0.029, 0.030, 0.032])
        [verdict] = judge(
            rule_for("x"), [replace(each, tags={"stand_ins": which.get(each.point, "none")}) for each in runs]
        )
        return verdict

    verdict = standing(x1="fp32 stands in; paged is plain", x0="paged is plain")
    assert (verdict.answer, verdict.pairs) == (Answer.incomparable, 0)
    assert "x1" in verdict.why
    assert "fp32 stands in" in verdict.why
    assert "paged" not in verdict.why, "both sides have it"
    assert "x0" in standing(x0="fp32 stands in").why
    assert standing().answer is standing(x0="same", x1="same").answer is Answer.faster


def test_the_gpus_own_work_is_a_second_number_over_the_same_pairs() -> None:
    def with_gpu(each: Run) -> Run:
        work = math.exp(0.001 + 1e-5 * each.block) if each.point == "x1" else 1.0
        metrics = {**each.metrics, GPU_BUSY_SHARE: work * each.metrics[TOKENS_PER_SECOND] / 200}
        measured = Trial(
            run_id="", name="", sweep=None, outcome="finished", params={}, metrics=metrics, tags={}, started_ms=0
        )
        assert GPU_WORK.of(measured) == pytest.approx(1e6 * work / 200), "the report's measure of the same name"
        return replace(each, metrics=metrics)

    runs = [with_gpu(each) for each in pairs("x", [-0.030, -0.028, -0.031, -0.029, -0.033, 0.5])]
    [verdict] = judge(rule_for("x"), runs)
    assert verdict.gpu is not None
    assert verdict.gpu.value == pytest.approx(0.001 + 1e-5 * 2), "of the first five pairs"
    assert verdict.gpu.low < verdict.gpu.value < verdict.gpu.high
    answer, gpu, _ = sentences(rule_for("x"), [verdict], used_minutes=7.2)
    assert answer == "x1 is slower than x0: -3.0 % tokens/s (95 %: -3.3 to -2.7), 5 pairs in 7 minutes."
    assert "+0.10 % time (95 %: +0.10 to +0.10)" in gpu


def alike(changes: Sequence[float], count: int) -> list[float]:
    """As many pairs of the same mean and spread."""
    step = np.std(changes, ddof=1) * math.sqrt((count - 1) / (count // 2 * 2))
    return [np.mean(changes) + sign * step for sign in (1, -1)] * (count // 2) + [np.mean(changes)] * (count % 2)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ([0.0, 0.03, -0.01, 0.04, 0.015], Answer.faster),
        ([0.012, -0.012, 0.010, -0.010, 0.0001], Answer.equivalent),
    ],
)
def test_what_is_not_settled_says_what_it_would_take(changes: list[float], answer: Answer) -> None:
    rule = rule_for("x")
    [verdict] = judge(rule, pairs("x", changes))
    assert verdict.answer is Answer.unsettled
    [line] = sentences(rule, [verdict], used_minutes=10.0, block_minutes=2.0)
    assert f"resume=true budget_minutes={10 + 2 * verdict.more_pairs}" in line
    count = 5 + verdict.more_pairs
    before = max(pairs for pairs, _ in itertools.islice(rule.looks(), 20) if pairs < count)
    assert (judged(alike(changes, count)).answer, judged(alike(changes, before)).answer) == (answer, Answer.unsettled)
    family = "abcdefgh"
    strict, *_ = judge(rule_for(*family), [run for name in family for run in pairs(name, changes)])
    assert strict.more_pairs > verdict.more_pairs, "eight together are tested more strictly"


def test_what_noise_puts_out_of_reach_has_no_budget_and_no_endless_interval() -> None:
    rule, changes = rule_for("x"), [2.5, -1.9, 2.0, -0.7, 2.6]
    [verdict] = judge(rule, pairs("x", changes))
    assert verdict.more_pairs > 50
    for known in ({}, {"used_minutes": 10.0, "block_minutes": 2.0}):
        [line] = sentences(rule, [verdict], **known)
        assert "out of reach" in line
        assert "measure.steps" in line
        assert "budget_minutes" not in line
        assert "95 %" not in line, "it would reach from a tenth to the tenfold and beyond"
    slow = judged([0.012, -0.012, 0.010, -0.010, 0.0001])
    for minutes, reached in ((100 / slow.more_pairs, True), (1.01 * 100 / slow.more_pairs, False)):
        [line] = sentences(rule, [slow], used_minutes=5.0, block_minutes=minutes)
        assert ("budget_minutes=105" in line) == reached, "ten times the budget of 10 minutes"


def test_what_answers_hold_for_is_said_once_and_only_with_an_answer() -> None:
    open_, settled = judged([0.01]), judged([0.030, 0.031, 0.029, 0.030, 0.032])
    said = sentences(rule_for("x"), [settled, open_, settled])
    assert ["session" in line for line in said] == [False, False, False, True]
    assert not any("session" in line for line in sentences(rule_for("x"), [open_]))


def test_a_large_change_with_a_narrow_interval_has_its_interval() -> None:
    verdict = judged([3.0, 3.01, 2.99, 3.0, 3.02])
    assert "(95 %: " in sentences(rule_for("x"), [verdict])[0]


def test_no_advice_exceeds_what_the_setting_takes() -> None:
    rule = replace(rule_for("x"), budget_minutes=1e6)
    [line] = sentences(rule, [judged([0.01])], used_minutes=1e6, block_minutes=1e6)
    assert "budget_minutes=1000000)" in line


def test_before_two_pairs_those_of_the_first_look_are_missing() -> None:
    assert [judged([0.01] * count).more_pairs for count in (0, 1)] == [5, 4]
