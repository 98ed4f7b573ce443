"""What the card adds to a figure, in a sweep whose points ran side by side on several cards of one kind.

Cards of one name differ by a few per cent, in speed by how they are cooled and in energy by their sensors. Which card a
point got was left to chance, so a difference between points that ran on different cards is right on average, but
scatters by what the cards add. With repeats it can be separated from what the points add, and subtracted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_FREEDOM = 10
"""What must be left to estimate noise from, for each card but one. With less, taking the cards out would make intervals
much too narrow: nobody counts the freedom that it costs."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A figure, with what may have decided it."""

    run_id: str
    point: tuple[str, ...]
    """The settings."""
    repeat: int
    card: str
    value: float


def card_effects(found: Sequence[Placed]) -> dict[str, float]:
    """Return what each trial's card adds to its figure, by run id, against the mean of the cards. All trials are of one
    sweep.

    By least squares, value ~ point + repeat + card. Empty with one card, and where the cards cannot be told from the
    points, or only with too little left to see the noise by."""
    cards = sorted({each.card for each in found})
    if len(cards) < 2:
        return {}
    others = np.hstack([_indicators([each.point for each in found]), _indicators([each.repeat for each in found])])
    codes = np.vstack([np.eye(len(cards) - 1), -np.ones(len(cards) - 1)])  # they add up to 0 over the cards
    of_cards = codes[[cards.index(each.card) for each in found]]
    columns = np.hstack([others, of_cards])
    rank = int(np.linalg.matrix_rank(columns))
    if rank < np.linalg.matrix_rank(others) + len(cards) - 1 or len(found) - rank < LEAST_FREEDOM * (len(cards) - 1):
        return {}
    coefficients = np.linalg.lstsq(columns, np.array([each.value for each in found]), rcond=None)[0]
    added = of_cards @ coefficients[others.shape[1] :]
    return {each.run_id: float(value) for each, value in zip(found, added, strict=True)}


def _indicators(groups: Sequence[object]) -> NDArray[np.float64]:
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.eye(len(numbers))[[numbers[group] for group in groups]]
