"""Names of points among the others of their environment."""

from lora_lab.report.answers.pareto import Point
from lora_lab.report.findings import GroupFindings
from lora_lab.report.writing.labels import levels_text, usual_levels


def point_text(point: Point, found: GroupFindings) -> str:
    """Return a point's name without what most points share."""
    factors = found.design.factors
    usual = usual_levels(found.points, factors)
    return levels_text(point.levels, factors, usual) or levels_text(point.levels, factors, {}) or "the only point"
