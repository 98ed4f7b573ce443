"""Choose the rows to hold out, by their content."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.config import InvalidInput
from lora_lab.dataset.content import by_content


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows are held out, and how well that separates trained from held-out rows."""

    held: list[int]
    """In the order of their digests, so that the first of them are the same ones in a longer file."""
    repeated: int
    """Rows that are equal to an earlier one."""
    prompts_trained: int
    """Held-out rows whose prompt is trained on too, with another answer."""


def split_rows(rows: Sequence[Any], share: float, own: int = 0) -> Split:
    """Hold out a share of the rows.

    Args:
        own: the last this many of them are the held-out rows instead, which a file of their own has.

    Raises: InvalidInput when too many are equal."""
    held = [*range(len(rows) - own, len(rows))] if own else heldout_indices(rows, share)
    apart = set(held)
    trained = {row.prompt for index, row in enumerate(rows) if index not in apart and row.prompt}
    asked_again = sum(rows[index].prompt in trained for index in held)
    return Split(held, repeated=len(rows) - len(set(rows)), prompts_trained=asked_again)


def heldout_indices(rows: Sequence[Hashable], share: float) -> list[int]:
    """Choose the rows to hold out: those whose digests come first. At least one, and of equal rows all or none, so that
    none is also trained on.

    The order of the rows, the seed and the batch size change nothing. In a file that grew, a row stays held out unless
    new ones with earlier digests take its place.

    Raises: InvalidInput when every row is repeated more often than rows are to be held out."""
    room = max(1, round(len(rows) * share))
    places: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row, []).append(index)
    if len(places) == 1 < len(rows):
        raise InvalidInput(
            f"all {len(rows)} rows are equal, so none can be held out that is not trained on. Give rows that differ."
        )
    held: list[int] = []
    for row in by_content([row for row, where in places.items() if len(where) <= room]):
        if len(held) + len(places[row]) <= room:
            held += places[row]
    if not held:
        fewest = min(map(len, places.values()))
        raise InvalidInput(
            f"data.holdout={share:g} of {len(rows)} rows is {room}, but each of the {len(places)} different ones comes "
            f"{fewest} times or more, and equal rows are held out together. "
            f"Use data.holdout={math.ceil(100 * fewest / len(rows)) / 100} or more, or rows that differ."
        )
    return held


def check_row_count(count: int, holdout: float, needed: int, which: str = "rows") -> None:
    """Raise InvalidInput unless, after holding out, `needed` rows (one optimizer step's) remain to train on."""
    remaining = count - max(1, round(count * holdout))
    if remaining < needed:
        raise InvalidInput(
            f"the data has {count} {which}, {remaining} after holding out {holdout:.0%}, but one step needs {needed} "
            "(batch_size x grad_accum_steps x workers). Use more rows or a smaller batch_size."
        )
