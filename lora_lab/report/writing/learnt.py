"""What is said of held-out losses that are paired by row."""

from lora_lab.report.answers.learnt import Learnt
from lora_lab.report.answers.pareto import Point
from lora_lab.report.findings import GroupFindings


def is_compared(found: GroupFindings) -> bool:
    """Return whether the losses of at least two points are paired."""
    return any(answer is not None and answer.over_lowest is not None for answer in found.learnt)


def ordered(found: GroupFindings) -> list[tuple[Point, Learnt]]:
    """Return the points with their held-out losses, the lowest first."""
    both = [(point, answer) for point, answer in zip(found.points, found.learnt, strict=True) if answer is not None]
    return sorted(both, key=lambda one: one[1].loss)


def trade(found: GroupFindings) -> str:
    """Return how many points are faster but worse, in a sentence; "" where none is."""
    marked = sum(answer is not None and answer.worse_than is not None for answer in found.learnt)
    if not marked:
        return ""
    subject = "1 configuration is" if marked == 1 else f"{marked} configurations are"
    return f"{subject} faster than another, but worse in held-out loss (95 % over rows)."
