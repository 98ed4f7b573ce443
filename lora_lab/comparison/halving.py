"""Successive halving: after each rung the better half of a setting's values goes on, the others stop.

A **contender** is everything of a point but the setting that is searched. Each contender has its own values and its own
halving, so that all are compared at their best value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONTENDER, VALUE, RUNG, STOPPED = "halving.contender", "halving.value", "halving.rung", "halving.stopped"
"""Tags of a trial: its contender, its value (learning_rate=0.0002), its rung (1 of 3), and why its value stopped after
this rung; NOT_STOPPED for one that went on. Trials of the last rung have no STOPPED."""

NOT_STOPPED = "no"
LOSS = "loss/eval"
"""The metric that decides: the lowest goes on."""


@dataclass(frozen=True, slots=True)
class Tried:
    """How one value of a contender ended in a rung."""

    value: str
    """As a trial's tag has it: learning_rate=0.0002."""
    loss: float | None
    """Its held-out loss; None where it did not finish."""
    ended: str = ""
    """How it ended instead, in words."""

    @property
    def counts(self) -> bool:
        """Return whether it can go on."""
        return self.loss is not None and math.isfinite(self.loss)


def kept(tried: int, next_is_last: bool) -> int:
    """Return how many of the values go on: the better half, rounded up; the best alone into the last rung."""
    return 1 if next_is_last else math.ceil(tried / 2)


def choose(tried: Sequence[Tried], keep: int) -> dict[str, str]:
    """Choose which values go on.

    Of equal losses the one that was asked for first is before the others. A value without a finite loss never goes on.

    Returns: for each value why it stops; NOT_STOPPED for those that go on."""
    ranked = sorted((each for each in tried if each.counts), key=lambda each: each.loss or 0.0)
    going = {each.value for each in ranked[:keep]}
    return {each.value: NOT_STOPPED if each.value in going else _why(each, ranked) for each in tried}


def _why(each: Tried, ranked: Sequence[Tried]) -> str:
    if each.loss is None:
        return each.ended or "it has no held-out loss"
    if not math.isfinite(each.loss):
        return f"its held-out loss is {each.loss:g}"
    best = ranked[0]
    if each.loss == best.loss:
        return f"its held-out loss {each.loss:.4f} was also that of {best.value}, which was asked for first"
    return f"its held-out loss {each.loss:.4f} was behind {best.loss:.4f} of {best.value}"


def at_the_edge(value: str, values: Sequence[str]) -> str:
    """Return "lowest" or "highest" where a value is an end of those that were tried, so that a better one may lie
    beyond; else "".

    Args:
        value, values: as tags have them: learning_rate=0.0002. Values that are not numbers have no ends.
    """
    try:
        numbers = [float(each.partition("=")[2]) for each in values]
        own = float(value.partition("=")[2])
    except ValueError:
        return ""
    if len(set(numbers)) < 2:
        return ""
    return "lowest" if own == min(numbers) else "highest" if own == max(numbers) else ""
