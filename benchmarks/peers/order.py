"""Order the contenders of a round, so that neither place nor predecessor goes with the contender."""

from collections.abc import Sequence
from typing import TypeVar

_Named = TypeVar("_Named")


def order(names: Sequence[_Named], number: int) -> list[_Named]:
    """Return the order of round `number` (from 0), a row of a Williams design (E. J. Williams, 1949).

    As many rounds as contenders are a Latin square: each contender is once in each place. With an even count each
    also follows each other contender once. An odd count needs twice as many rounds for that.
    """
    count = len(names)
    steps = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2, ...
    row = [names[(step + number) % count] for step in steps]
    mirrored = count % 2 == 1 and number // count % 2 == 1
    return row[::-1] if mirrored else row
