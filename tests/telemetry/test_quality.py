"""What the losses of rows and the answers say of a trained model, as figures."""

from dataclasses import replace

import pytest

from lora_lab.events import GENERAL, HELDOUT, Answered, Event, RowLosses, decode, encode
from lora_lab.phase import Phase
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.metrics import METRICS
from lora_lab.telemetry.quality import add_quality


def losses(phase: Phase, nats: list[float], text: str = HELDOUT, step: int | None = None) -> RowLosses:
    return RowLosses(
        t=1.0, phase=phase.value, text=text, nats=nats, tokens=[10 + i for i in range(len(nats))], digest="d", step=step
    )


def answered(tuned: bool, ended: list[bool], exact: list[bool]) -> Answered:
    tokens = [3 if stops else 128 for stops in ended]
    return Answered(t=1.0, tuned=tuned, ended=ended, tokens=tokens, exact=exact, most_tokens=128)


def summary_of(*events: Event) -> Summary:
    summary = Summary()
    add_quality(summary, [decode(encode(event)) for event in events])
    assert summary.metrics.keys() | summary.absent.keys() <= METRICS.keys()
    assert summary.metrics.keys() & summary.absent.keys() == set()
    return summary


def test_the_change_of_the_heldout_loss_has_an_interval_and_counts_rows() -> None:
    before = [30.0 + i for i in range(20)]
    after = [nats - 5 for nats in before[:15]] + [nats + 1 for nats in before[15:]]
    mid = losses(Phase.evaluation, [99.0] * 20, step=5)
    found = summary_of(losses(Phase.evaluation_before, before), mid, losses(Phase.evaluation_after, after)).metrics
    tokens = sum(range(10, 30))
    assert found["loss/eval_change"] == pytest.approx((5 - 75) / tokens)
    assert found["loss/eval_change_low"] < found["loss/eval_change"] < found["loss/eval_change_high"] < 0
    assert found["loss/eval_rows_improved"] == 0.75
    assert not any(name.startswith("loss/general") for name in found)


def test_few_rows_have_no_interval_and_an_early_end_no_change() -> None:
    few = summary_of(losses(Phase.evaluation_before, [3.0] * 4), losses(Phase.evaluation_after, [2.0] * 4))
    assert few.metrics["loss/eval_change"] < 0
    assert "4 rows" in few.absent["loss/eval_change_low"]
    stopped = summary_of(losses(Phase.evaluation_before, [3.0] * 4), losses(Phase.evaluation_before, [1.0], GENERAL))
    assert "stopped" in stopped.absent["loss/eval_change"]
    assert stopped.metrics.keys() == {"loss/general_before"}
    assert "stopped" in stopped.absent["loss/general_after"]
    broken = summary_of(losses(Phase.evaluation_before, [3.0]), losses(Phase.evaluation_after, [float("nan")]))
    assert "finite" in broken.absent["loss/eval_change"]
    assert summary_of().absent == {}, "a trial of before has nothing to say"


def test_forgetting_is_the_change_on_general_text() -> None:
    found = summary_of(
        losses(Phase.evaluation_before, [20.0] * 32, GENERAL), losses(Phase.evaluation_after, [25.0] * 32, GENERAL)
    ).metrics
    tokens = sum(range(10, 42))
    assert found["loss/general_before"] == pytest.approx(640 / tokens)
    assert found["loss/general_after"] == pytest.approx(800 / tokens)
    assert found["loss/general_change"] == pytest.approx(160 / tokens)
    assert found["loss/general_change_low"] > 0


def test_answers_are_shares_with_intervals() -> None:
    found = summary_of(
        answered(False, ended=[False] * 4, exact=[False] * 4),
        answered(True, ended=[True, True, True, False], exact=[True, False, False, False]),
    ).metrics
    assert found["quality/answers"] == 4
    assert (found["quality/stop_rate_base"], found["quality/stop_rate_tuned"]) == (0.0, 0.75)
    assert (found["quality/answer_tokens_base"], found["quality/answer_tokens_tuned"]) == (128.0, (9 + 128) / 4)
    assert found["quality/exact_match_tuned"] == 0.25
    assert 0 < found["quality/exact_match_tuned_low"] < 0.25 < found["quality/exact_match_tuned_high"] < 1
    assert found["quality/exact_match_base_low"] == 0.0


def rouge_of(scores: list[float | None], no_rouge_l: str = "") -> Summary:
    flags = [False] * 12
    one = replace(answered(True, ended=flags, exact=flags), rouge_l=scores, no_rouge_l=no_rouge_l)
    summary = Summary()
    add_quality(summary, [one])
    return summary


def test_rouge_has_an_interval_over_the_answers_that_are_scored() -> None:
    found = rouge_of([0.2, 0.4] * 5 + [None, None]).metrics
    assert found["quality/rouge_l_tuned"] == pytest.approx(0.3)
    assert found["quality/rouge_l_answers"] == 10
    assert 0.2 < found["quality/rouge_l_tuned_low"] < 0.3 < found["quality/rouge_l_tuned_high"] < 0.4


def test_rouge_is_absent_with_its_reason() -> None:
    few = rouge_of([0.5] * 9 + [None] * 3)
    assert few.metrics["quality/rouge_l_tuned"] == 0.5
    assert "9 answers" in few.absent["quality/rouge_l_tuned_low"]
    assert "no gold answer" in rouge_of([None] * 12).absent["quality/rouge_l_tuned"]
    assert rouge_of([], "not installed").absent["quality/rouge_l_tuned"] == "not installed"
    older = rouge_of([])
    assert not [name for name in (*older.metrics, *older.absent) if "rouge" in name]
