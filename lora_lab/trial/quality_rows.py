"""What is shown of a trained model's quality when a trial is over."""

from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.metrics import metric


def quality_rows(summary: Summary) -> list[tuple[str, str]]:
    """Return titles and texts: the changes of the held-out loss and of the loss on general text with their intervals,
    and the answers before and after. What was not evaluated is left out."""
    changes = (key for key in ("loss/eval_change", "loss/general_change") if key in summary.metrics)
    rows = [(metric(key).title, _change(summary, key)) for key in changes]
    improved = summary.metrics.get("loss/eval_rows_improved")
    if improved is not None:
        rows.append((metric("loss/eval_rows_improved").title, f"{improved:.0%}"))
    for key in ("quality/stop_rate", "quality/answer_tokens", "quality/exact_match", "quality/rouge_l"):
        before, after = (summary.metrics.get(f"{key}_{who}") for who in ("base", "tuned"))
        if before is not None and after is not None:
            described = metric(f"{key}_tuned")
            text = f"{described.form.format(before)} before, {described.form.format(after)} after"
            rows.append((described.title.partition(",")[0], text))
    return rows


def _change(summary: Summary, key: str) -> str:
    text = metric(key).write(summary.metrics[key])
    low, high = (summary.metrics.get(f"{key}_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return f"{text} ({summary.absent.get(f'{key}_low', 'no interval')})"
    return f"{text} (95 %: {low:+.4f} to {high:+.4f})"
