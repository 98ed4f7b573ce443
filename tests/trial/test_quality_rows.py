"""What is shown of quality at a trial's end: changes with their intervals, answers before and after, or nothing."""

from lora_lab.telemetry.figures import Summary
from lora_lab.trial.quality_rows import quality_rows


def test_a_job_shows_what_was_learnt_and_what_was_forgotten() -> None:
    summary = Summary(
        metrics={
            "loss/eval_change": -0.51234,
            "loss/eval_change_low": -0.6,
            "loss/eval_change_high": -0.4,
            "loss/eval_rows_improved": 0.94,
            "loss/general_change": 0.01,
            "quality/stop_rate_base": 0.25,
            "quality/stop_rate_tuned": 1.0,
        },
        absent={"loss/general_change_low": "8 rows; an interval needs 10"},
    )
    shown = dict(quality_rows(summary))
    assert shown["change of held-out loss"] == "-0.5123 nats per token (95 %: -0.6000 to -0.4000)"
    assert "8 rows" in shown["change of general loss"]
    assert shown["held-out rows with a lower loss"] == "94%"
    assert shown["turns ended"] == "25% before, 100% after"
    assert len(shown) == 4


def test_a_trial_that_was_not_evaluated_shows_nothing() -> None:
    assert quality_rows(Summary(metrics={"loss/train": 1.0, "quality/stop_rate_base": 0.5})) == []
