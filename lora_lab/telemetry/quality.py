"""Add how good the trained model is: losses on the same rows before and after, and how it answers."""

from collections.abc import Sequence
from statistics import fmean

from lora_lab.events import GENERAL, HELDOUT, Answered, Event, RowLosses
from lora_lab.phase import Phase
from lora_lab.quality.paired import FEWEST_ROWS, change
from lora_lab.quality.proportion import wilson
from lora_lab.quality.rouge import NO_SHORT_ANSWER
from lora_lab.telemetry.figures import Summary

_STOPPED = "the trial stopped before it was evaluated again"


def add_quality(summary: Summary, events: Sequence[Event]) -> None:
    """Add the change of the held-out loss, the loss on general text, and the scores of the answers."""
    _add_change(summary, events, HELDOUT, "loss/eval_change", "loss/eval_rows_improved")
    _add_general(summary, events)
    for answered in (event for event in events if isinstance(event, Answered)):
        _add_answers(summary, answered)


def evaluated_rows(events: Sequence[Event], text: str, phase: Phase) -> RowLosses | None:
    """Return the rows' losses of a phase; None where they were not sent."""
    found = (e for e in reversed(events) if isinstance(e, RowLosses) and e.text == text and e.phase == phase.value)
    return next(found, None)


def _add_change(summary: Summary, events: Sequence[Event], text: str, name: str, improved: str = "") -> None:
    before = evaluated_rows(events, text, Phase.evaluation_before)
    after = evaluated_rows(events, text, Phase.evaluation_after)
    if before is None:
        return
    names = (name, f"{name}_low", f"{name}_high", *([improved] if improved else []))
    if after is None:
        summary.without(names, _STOPPED)
        return
    found = change(after.nats, before.nats, after.tokens)
    if found is None:
        summary.without(names, "a row's loss is not a finite number")
        return
    summary.metrics[name] = found.value
    few = f"{found.rows} rows; an interval needs {FEWEST_ROWS}"
    summary.add(f"{name}_low", found.low, few)
    summary.add(f"{name}_high", found.high, few)
    if improved:
        summary.metrics[improved] = found.improved


def _add_general(summary: Summary, events: Sequence[Event]) -> None:
    before = evaluated_rows(events, GENERAL, Phase.evaluation_before)
    after = evaluated_rows(events, GENERAL, Phase.evaluation_after)
    if before is None:
        return
    summary.add("loss/general_before", _mean(before), _STOPPED)
    summary.add("loss/general_after", None if after is None else _mean(after), _STOPPED)
    _add_change(summary, events, GENERAL, "loss/general_change")


def _mean(rows: RowLosses) -> float:
    return sum(rows.nats) / sum(rows.tokens)


def _add_answers(summary: Summary, answered: Answered) -> None:
    """Add the shares and lengths of one model's answers."""
    who, count = "tuned" if answered.tuned else "base", len(answered.ended)
    exact = sum(answered.exact)
    low, high = wilson(exact, count)
    summary.metrics |= {
        "quality/answers": float(count),
        f"quality/stop_rate_{who}": sum(answered.ended) / count,
        f"quality/answer_tokens_{who}": fmean(answered.tokens),
        f"quality/exact_match_{who}": exact / count,
        f"quality/exact_match_{who}_low": low,
        f"quality/exact_match_{who}_high": high,
    }
    _add_rouge(summary, answered, f"quality/rouge_l_{who}")


def _add_rouge(summary: Summary, answered: Answered, name: str) -> None:
    """Add the mean F1 of the scored answers and its interval; nothing in trials from before these were scored."""
    if not answered.rouge_l and not answered.no_rouge_l:
        return
    scores = [score for score in answered.rouge_l if score is not None]
    found = change(scores, [0.0] * len(scores), [1] * len(scores))  # the mean is the change from 0
    if found is None:
        summary.without((name, f"{name}_low", f"{name}_high"), answered.no_rouge_l or NO_SHORT_ANSWER)
        return
    summary.metrics |= {"quality/rouge_l_answers": float(len(scores)), name: found.value}
    few = f"{found.rows} answers; an interval needs {FEWEST_ROWS}"
    summary.add(f"{name}_low", found.low, few)
    summary.add(f"{name}_high", found.high, few)
