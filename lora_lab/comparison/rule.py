"""The rule by which a sweep with repeats=auto stops. It is written into the sweep's record before the first trial."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lora_lab.config import InvalidInput

TOKENS_PER_SECOND = "throughput/tokens_per_second"
GPU_BUSY_SHARE = "throughput/gpu_busy_share"

RULE_TAG = "stopping_rule"
"""The tag of a sweep that has its rule as JSON."""

_GROWTH = 1.5
"""Each look comes after this many times the pairs of the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Two levels of one setting that are compared."""

    key: str
    over: str
    """The name of the level that was typed first: the baseline."""
    of: str
    """The name of the other level."""
    over_points: tuple[str, ...]
    """Digests of the points with the first level."""
    of_points: tuple[str, ...]
    """Digests of the points with the other level, each at the place of the point that else is the same."""

    @property
    def points(self) -> tuple[str, ...]:
        """Return the digests of all its points."""
        return *self.over_points, *self.of_points


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """All that decides when the sweep stops and what it answers, besides the trials' figures."""

    contrasts: tuple[Contrast, ...]
    """The family: all answers together are wrong with a probability of at most `level`."""
    margin_percent: float
    """A smaller change does not matter to the user."""
    budget_minutes: float
    """No block of trials begins that would probably end later. It decides no answer, so it may grow on resume."""
    first_pairs: int
    level: float = 0.05
    """The largest probability of a false "faster" or "slower", and that of a false "equivalent"."""
    measure: str = TOKENS_PER_SECOND

    @property
    def margin(self) -> float:
        """Return the margin as a difference of logarithms."""
        return math.log1p(self.margin_percent / 100)

    def looks(self) -> Iterator[tuple[int, float]]:
        """Yield after how many pairs the figures are looked at, each with the level of its tests.

        Each look spends half of the level that is left. So all looks together, however many there will be, spend no
        more than `level` (Bonferroni)."""
        pairs, level = self.first_pairs, self.level / 2
        while True:
            yield pairs, level
            pairs, level = math.ceil(_GROWTH * pairs), level / 2


def percent(text: str) -> float:
    """Read a margin such as "1%" or "0.5 %".

    Raises: InvalidInput."""
    number = text.strip().removesuffix("%")
    try:
        found = float(number) if text.strip().endswith("%") else math.nan
    except ValueError:
        found = math.nan
    if not 0 < found < 100:
        raise InvalidInput(
            f"margin={text} has to be more than 0% and less than 100%, with the % sign: for example margin=1%."
        )
    return found
