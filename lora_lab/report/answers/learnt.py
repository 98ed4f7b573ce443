"""What the settings learn: whether each one's held-out loss differs from the lowest, and which are faster but worse."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lora_lab.quality.paired import Change
from lora_lab.report.measures import LOSS, THROUGHPUT, Measure
from lora_lab.report.statistics.heldout import loss_over
from lora_lab.store.trials import Trial

_FASTER = 1.01
"""A speed is called higher from here on: trials of one setting differ by about that much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """The held-out loss of one setting among several."""

    loss: float
    """Median of its trials."""
    is_lowest: bool
    over_lowest: Change | None
    """Its loss minus the lowest setting's, paired by row; None for that one, and where they share no rows."""
    worse_than: tuple[int, ...]
    """The settings, by place, that it is faster than and whose loss is lower, with an interval off zero."""

    @property
    def words(self) -> str:
        """Return the answer in words."""
        if self.is_lowest:
            return "lowest"
        if self.over_lowest is None:
            return "no common rows with the lowest"
        if self.over_lowest.low is None or self.over_lowest.high is None:
            return f"{self.over_lowest.value:+.4f}, too few rows for an interval"
        found = f"{self.over_lowest.value:+.4f} ({self.over_lowest.low:+.4f} to {self.over_lowest.high:+.4f})"
        if not self.over_lowest.is_seen:
            return f"{found}, does not differ"
        return f"{found}, faster but worse" if self.worse_than else found


def learnt(settings: Sequence[Sequence[Trial]]) -> list[Learnt | None]:
    """Return the answer for each setting, given its measured trials; None for one without a held-out loss.

    Each interval is one of 95 %, and takes no account of how many there are."""
    losses = [_median(trials, LOSS) for trials in settings]
    known = [loss for loss in losses if loss is not None]
    if not known:
        return [None] * len(settings)
    lowest = losses.index(min(known))
    return [
        None
        if loss is None
        else Learnt(
            loss=loss,
            is_lowest=place == lowest,
            over_lowest=None if place == lowest else loss_over(settings[place], settings[lowest]),
            worse_than=tuple(
                other for other in range(len(settings)) if other != place and _is_trade(settings, place, other)
            ),
        )
        for place, loss in enumerate(losses)
    ]


def _is_trade(settings: Sequence[Sequence[Trial]], place: int, other: int) -> bool:
    """Return whether the setting is faster than the other, and its loss is worse with an interval off zero."""
    speed, slower = (_median(settings[each], THROUGHPUT) for each in (place, other))
    if speed is None or slower is None or speed < _FASTER * slower:
        return False
    found = loss_over(settings[place], settings[other])
    return found is not None and found.low is not None and found.low > 0


def _median(trials: Sequence[Trial], measure: Measure) -> float | None:
    values = [value for trial in trials if (value := measure.of(trial)) is not None]
    return median(values) if values else None
