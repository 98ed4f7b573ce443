"""What quality costs: settings that no other is both better and cheaper than, for held-out loss against each cost.

Losses are compared on the same held-out rows, and what the rows cannot tell apart is no difference: the cheaper of two
such settings stands for both. That relation is not transitive, so a setting is beaten only by one on the front. Then
everything off the front has one on it that is cheaper and not seen to be worse, or better and no dearer.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lora_lab.quality.paired import FEWEST_ROWS, Change
from lora_lab.quality.row_losses import HeldoutRows, difference
from lora_lab.report.measures import ENERGY, HOURS, KWH, THROUGHPUT, VRAM, Better, Measure
from lora_lab.report.statistics.heldout import rows_of
from lora_lab.report.statistics.kinds import Kind, kind_of
from lora_lab.store.trials import Trial

CHEAPER = 1.01
"""A cost is called lower from this ratio on: trials of one setting differ by about that much."""

_COSTS = {Kind.job: ((HOURS,), (KWH, ENERGY), (VRAM,)), Kind.window: ((THROUGHPUT,), (ENERGY,), (VRAM,))}
"""Of each cost the measures in order of preference."""

_WORDS = {HOURS: "hours", KWH: "energy", ENERGY: "energy", VRAM: "memory", THROUGHPUT: "speed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where one setting stands between loss and a cost."""

    cost: float
    """Median of its trials."""
    beaten_by: int | None
    """The place of a setting on the front that beats this one; None on the front."""
    how: str
    """In what it is beaten; "" on the front."""

    def says(self, rival: str) -> str:
        """Return in words where it stands, given the name of what beats it."""
        return "on the front" if self.beaten_by is None else f"{rival} is {self.how}"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFront:
    """Held-out loss against one cost."""

    cost: Measure
    standings: tuple[Standing | None, ...]
    """Of each setting; None where it lacks the cost, or its loss is not of the same rows as most others'."""

    @property
    def against(self) -> str:
        """Return in a word what the loss is weighed against."""
        return _WORDS[self.cost]

    @property
    def places(self) -> list[int]:
        """Return the places of the settings on the front."""
        return [place for place, one in enumerate(self.standings) if one is not None and one.beaten_by is None]


def quality_fronts(settings: Sequence[Sequence[Trial]]) -> list[QualityFront]:
    """Return a front for each cost that at least two comparable settings have, given each setting's measured trials.

    All trials must be of one kind. There is none without losses of at least FEWEST_ROWS common rows."""
    rows = _common(settings)
    if len(rows) < 2:
        return []

    @functools.cache
    def over(one: int, other: int) -> Change | None:
        return difference(rows[one], rows[other])

    made = []
    for measures in _COSTS[kind_of(settings[min(rows)][0])]:
        found = ((measure, {place: _median(settings[place], measure) for place in rows}) for measure in measures)
        known = [(measure, {place: v for place, v in costs.items() if v is not None}) for measure, costs in found]
        measure, costs = next((one for one in known if len(one[1]) > 1), (None, {}))
        if measure is None:
            continue
        standings: dict[int, Standing] = {}
        for place in sorted(costs, key=lambda one: (_dear(costs[one], measure), _loss(rows[one]))):
            beaten = [
                (_loss(rows[rival]), rival, how)
                for rival, standing in standings.items()
                if standing.beaten_by is None
                and (how := _beats(_dear(costs[place], measure) / _dear(costs[rival], measure), over(place, rival)))
            ]
            _, rival, how = min(beaten, default=(0.0, None, ""))
            standings[place] = Standing(cost=costs[place], beaten_by=rival, how=how)
        made.append(QualityFront(cost=measure, standings=tuple(standings.get(at) for at in range(len(settings)))))
    return made


def _common(settings: Sequence[Sequence[Trial]]) -> dict[int, HeldoutRows]:
    """Return the held-out rows of the settings by their places, of the settings that share most common rows."""
    found = {place: rows for place, trials in enumerate(settings) if trials and (rows := rows_of(trials)) is not None}
    enough = {place: rows for place, rows in found.items() if len(rows.tokens) >= FEWEST_ROWS}
    most = Counter(rows.digest for rows in enough.values()).most_common(1)
    return {place: rows for place, rows in enough.items() if rows.digest == most[0][0]}


def _beats(dearer: float, over: Change | None) -> str:
    """Return in what a rival beats a setting; "" where it does not.

    Args:
        dearer: the setting's cost over the rival's, at least 1.
        over: the setting's loss minus the rival's.
    """
    if over is None or over.low is None or over.high is None or over.high < 0:
        return ""
    if over.low > 0:
        return "better and cheaper" if dearer >= CHEAPER else "better and no dearer"
    return "cheaper and not seen to be worse" if dearer >= CHEAPER else ""


def _dear(value: float, measure: Measure) -> float:
    """Return a figure on a scale on which less is cheaper, so that ratios stay ratios."""
    return 1 / value if measure.better is Better.higher else value


def _loss(rows: HeldoutRows) -> float:
    return sum(rows.nats) / sum(rows.tokens)


def _median(trials: Sequence[Trial], measure: Measure) -> float | None:
    values = [value for trial in trials if (value := measure.of(trial)) is not None]
    return median(values) if values else None
