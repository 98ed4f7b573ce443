"""What the settings learn: whether each one's held-out loss differs from the lowest, and which are faster but worse."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lora_lab.quality.paired import Change
from lora_lab.quality.row_losses import difference
from lora_lab.report.measures import LOSS, THROUGHPUT, Measure
from lora_lab.report.statistics.heldout import rows_of
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
    worse_than: int | None
    """Where it is faster but worse: the place of the setting with the lowest loss of those that it is faster than. Its
    own loss is higher, with an interval off zero."""

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
            return f"{found}, no difference seen"
        return f"{found}, faster but worse" if self.worse_than is not None else found


def learnt(settings: Sequence[Sequence[Trial]]) -> list[Learnt | None]:
    """Return the answer for each setting, given its measured trials; None for one without a held-out loss.

    Each interval is one of 95 %, and takes no account of how many there are."""
    losses = [_median(trials, LOSS) for trials in settings]
    known = [loss for loss in losses if loss is not None]
    if not known:
        return [None] * len(settings)
    lowest = losses.index(min(known))
    rows = [rows_of(trials) for trials in settings]
    speeds = [_median(trials, THROUGHPUT) for trials in settings]
    made: list[Learnt | None] = []
    for place, loss in enumerate(losses):
        if loss is None:
            made.append(None)
            continue
        slower = _best_slower(place, losses, speeds)
        over = None if slower is None else difference(rows[place], rows[slower])
        made.append(
            Learnt(
                loss=loss,
                is_lowest=place == lowest,
                over_lowest=None if place == lowest else difference(rows[place], rows[lowest]),
                worse_than=slower if over is not None and over.low is not None and over.low > 0 else None,
            )
        )
    return made


def _best_slower(place: int, losses: Sequence[float | None], speeds: Sequence[float | None]) -> int | None:
    """Return the place of the setting with the lowest loss of those that this one is faster than; None without any."""
    own = speeds[place]
    there = [
        (loss, other)
        for other, (loss, speed) in enumerate(zip(losses, speeds, strict=True))
        if loss is not None and speed is not None and own is not None and own >= _FASTER * speed
    ]
    return min(there)[1] if there else None


def _median(trials: Sequence[Trial], measure: Measure) -> float | None:
    values = [value for trial in trials if (value := measure.of(trial)) is not None]
    return median(values) if values else None
