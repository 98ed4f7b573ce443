"""Say verdicts in words."""

import math
from collections.abc import Sequence

from lora_lab.comparison.judge import Answer, Interval, Verdict
from lora_lab.comparison.rule import Rule
from lora_lab.config import LONGEST_BUDGET_MINUTES

_REACH = 10
"""What would take this many times the budget, or the pairs so far, is out of reach."""
_OUT_OF_REACH = "out of reach with this noise: use a wider margin or longer windows (measure.steps)"

_WIDEST = math.log(10)
"""How far an interval may reach to be worth printing, as a log ratio."""


def sentences(
    rule: Rule, verdicts: Sequence[Verdict], used_minutes: float | None = None, block_minutes: float | None = None
) -> list[str]:
    """Return a sentence for each verdict, one for the GPU's own work where it was measured, and one on what the answers
    hold for.

    Args:
        used_minutes: what the sweep took so far, where that is known.
        block_minutes: what a block of its trials took on average, where that is known.
    """
    missing = [v.more_pairs for v in verdicts if _within_reach(rule, v, used_minutes, block_minutes)]
    advice = ""
    if used_minutes is not None and block_minutes is not None:
        budget = math.ceil(used_minutes + max(missing, default=0) * block_minutes)
        advice = f" (add resume=true budget_minutes={min(budget, LONGEST_BUDGET_MINUTES)})"
    said = []
    for verdict in verdicts:
        said.append(_answer(rule, verdict, used_minutes))
        if verdict.answer is Answer.unsettled:
            reached = _within_reach(rule, verdict, used_minutes, block_minutes)
            about = f"about {_missing(verdict.more_pairs, block_minutes)}{advice}"
            said[-1] += f"; {about if reached else _OUT_OF_REACH}"
        said[-1] += "."
        if verdict.gpu is not None:
            said.append(f"  The GPU's own work per token: {_change(verdict.gpu, 'time')}.")
    if any(verdict.answer not in (Answer.unsettled, Answer.incomparable) for verdict in verdicts):
        said.append("  The speeds hold for this machine in this session; another may differ.")
    return said


def _within_reach(rule: Rule, verdict: Verdict, used_minutes: float | None, block_minutes: float | None) -> bool:
    """Return whether what is missing is a guess worth a number: it comes from the spread of the few pairs so far."""
    if verdict.change is None:
        return True
    if used_minutes is None or block_minutes is None:
        return verdict.more_pairs <= _REACH * max(verdict.pairs, rule.first_pairs)
    return verdict.more_pairs * block_minutes <= _REACH * max(used_minutes, rule.budget_minutes)


def _answer(rule: Rule, verdict: Verdict, used_minutes: float | None) -> str:
    of, over = verdict.contrast.of, verdict.contrast.over
    after = f"{verdict.pairs} pair{'' if verdict.pairs == 1 else 's'}"
    if used_minutes is not None:
        after += f" in {_minutes(used_minutes)}"
    if verdict.uncounted and verdict.answer is not Answer.incomparable:
        after += f" ({verdict.uncounted} more did not count, the last one because: {verdict.why_uncounted})"
    change = "" if verdict.change is None else _change(verdict.change, "tokens/s") + _by_setting(verdict)
    if verdict.answer in (Answer.faster, Answer.slower):
        return f"{of} is {verdict.answer.value} than {over}: {change}, {after}"
    if verdict.answer is Answer.equivalent:
        return f"{of} and {over} are equivalent within {rule.margin_percent:g} %: {change}, {after}"
    if verdict.answer is Answer.mixed:
        within = f"within {rule.margin_percent:g} % on average, but not in each setting"
        return f"{of} and {over} are {within}: {change}, {after}; compare them setting by setting"
    if verdict.answer is Answer.incomparable:
        return f"{of} and {over} cannot be compared: {verdict.why}; {after}"
    so_far = f": {change} so far" if change else ""
    return f"not settled between {of} and {over}{so_far}, {after}"


def _by_setting(verdict: Verdict) -> str:
    if not verdict.by_setting:
        return ""
    low, high = (100 * math.expm1(each(verdict.by_setting)) for each in (min, max))
    return f" on average over {len(verdict.by_setting)} settings ({low:+.1f} to {high:+.1f} % by setting)"


def _missing(pairs: int, block_minutes: float | None) -> str:
    return (
        f"{pairs:,} more pair{'' if pairs == 1 else 's'}"
        if block_minutes is None
        else _minutes(pairs * block_minutes, "more ")
    )


def _change(interval: Interval, what: str) -> str:
    center = interval.value if interval.low * interval.high > 0 else 0.0
    if max(center - interval.low, interval.high - center) > _WIDEST:
        return f"{100 * math.expm1(interval.value):+.1f} % {what} (too noisy for an interval)"
    value, low, high = (100 * math.expm1(each) for each in (interval.value, interval.low, interval.high))
    digits = 1 if abs(high - low) >= 0.2 else 2
    written = [f"{each:+.{digits}f}" for each in (value, low, high)]
    return f"{written[0]} % {what} ({100 * interval.confidence:.0f} %: {written[1]} to {written[2]})"


def _minutes(minutes: float, more: str = "") -> str:
    if minutes >= 120:
        return f"{minutes / 60:,.0f} {more}hours"
    whole = max(1, round(minutes))
    return f"{whole} {more}minute{'' if whole == 1 else 's'}"
