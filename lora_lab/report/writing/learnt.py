"""What is said of held-out losses that are paired by row, and of what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.quality.paired import FEWEST_ROWS
from lora_lab.report.answers.learnt import Learnt
from lora_lab.report.answers.pareto import Point
from lora_lab.report.answers.quality import QualityFront, Standing
from lora_lab.report.findings import GroupFindings
from lora_lab.report.writing.labels import count
from lora_lab.report.writing.point_names import point_text

_NAMED = 4
"""Points of a front that a sentence names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCell:
    """A cost of one point, and where the point stands in its front."""

    figure: str
    says: str
    on_front: bool


def is_compared(found: GroupFindings) -> bool:
    """Return whether the losses of at least two points are paired."""
    return any(answer is not None and answer.over_lowest is not None for answer in found.learnt)


def ordered(found: GroupFindings) -> list[tuple[Point, Learnt, list[CostCell]]]:
    """Return the points with their held-out losses and a cell for each cost, the lowest loss first."""
    made = [
        (point, answer, [_cell(front, front.standings[place], found) for front in found.quality])
        for place, (point, answer) in enumerate(zip(found.points, found.learnt, strict=True))
        if answer is not None
    ]
    return sorted(made, key=lambda one: one[1].loss)


def best_learnt(found: GroupFindings) -> tuple[Point, Learnt]:
    """Return the point with the lowest loss, of those that none is both better and cheaper than in the first cost.

    So of two whose losses the rows cannot tell apart it is the cheaper one. Without a front it is the lowest of all."""
    there = [(point, answer) for point, answer in zip(found.points, found.learnt, strict=True) if answer is not None]
    if found.quality:
        front = [found.points[place] for place in found.quality[0].places]
        there = [(point, answer) for point, answer in there if point in front]
    return min(there, key=lambda one: one[1].loss)


def no_worse(found: GroupFindings) -> str:
    """Return how many points the held-out rows cannot tell from the one with the lowest loss."""
    over = [other.over_lowest for _, other, _ in ordered(found) if other.over_lowest is not None]
    close = sum(not change.is_seen for change in over if change.low is not None)
    verb = "is" if close == 1 else "are"
    return f"{close or 'none'} of {count(len(over), 'other')} {verb} no worse, as far as the rows can show"


def front_sentences(found: GroupFindings) -> list[str]:
    """Return a sentence for each front, one for all that have the same points; or why there is none though losses are
    compared."""
    if is_compared(found) and not found.quality:
        return [
            f"No front of held-out loss against cost: it takes {FEWEST_ROWS} held-out rows that two configurations "
            "share (measure.eval_rows)."
        ]
    costs: dict[tuple[int, ...], list[str]] = {}
    for front in found.quality:
        costs.setdefault(tuple(front.places), []).append(front.against)
    return [
        f"Held-out loss against {_listed(against)}: no trial is both better and cheaper than "
        f"{_listed([point_text(found.points[place], found) for place in places])}."
        for places, against in costs.items()
    ]


def trade(found: GroupFindings) -> str:
    """Return how many points are faster but worse, in a sentence; "" where none is."""
    marked = sum(answer is not None and answer.worse_than is not None for answer in found.learnt)
    if not marked:
        return ""
    subject = "1 configuration is" if marked == 1 else f"{marked} configurations are"
    return f"{subject} faster than another, but worse in held-out loss (95 % over rows)."


def _cell(front: QualityFront, standing: Standing | None, found: GroupFindings) -> CostCell:
    if standing is None:
        return CostCell(figure="-", says="not compared", on_front=False)
    rival = "" if standing.beaten_by is None else point_text(found.points[standing.beaten_by], found)
    return CostCell(
        figure=front.cost.form.format(standing.cost), says=standing.says(rival), on_front=standing.beaten_by is None
    )


def _listed(names: Sequence[str]) -> str:
    """Return names in a sentence, the first ones where there are many."""
    shown = list(names[:_NAMED])
    if len(names) > _NAMED:
        shown.append(f"{len(names) - _NAMED} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
