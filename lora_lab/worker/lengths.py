"""Count how long the rows are, and what seq_len leaves of them."""

from dataclasses import dataclass

from lora_lab.worker.examples import Examples

_MOST_OF = 0.95


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens of all rows before they are cut; None for random tokens, which have no other length."""

    median: int | None = None
    p95: int | None = None
    most: int | None = None
    cut: int | None = None
    """Tokens beyond seq_len, of all rows together."""


def lengths_of(examples: Examples, seq_len: int) -> Lengths:
    """Return the lengths of a data set's rows, held-out ones included."""
    found = sorted(examples.lengths.tolist())
    if not found:
        return Lengths()
    return Lengths(
        median=_reaching(found, 0.5),
        p95=_reaching(found, _MOST_OF),
        most=found[-1],
        cut=sum(max(0, length - seq_len) for length in found),
    )


def _reaching(ascending: list[int], part: float) -> int:
    """Return the least length that this part of the rows does not exceed."""
    return next(length for place, length in enumerate(ascending, 1) if place >= part * len(ascending))
