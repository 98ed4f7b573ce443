"""The smallest difference that a figure can show at all, however often it is repeated."""

from dataclasses import replace

from lora_lab.report.measures import VRAM, Measure
from lora_lab.report.statistics.estimates import Estimate

_PIECE_GIB = 2 / 1024
"""The driver hands out a card's memory in pieces of 2 MiB."""
_ROUNDING = 1e-9
"""What summing in another order can change."""


def no_finer(found: Estimate, measure: Measure, value: float) -> Estimate:
    """The estimate with an interval no narrower than the measure can tell, at figures of about `value`: repeats that
    agree to the last digit (VRAM's do) would else make every difference count."""
    if found.low is None or found.high is None:
        return found
    least = _ROUNDING * (1.0 if measure.ratios else abs(value))
    if measure == VRAM:
        least = _PIECE_GIB / value
    return replace(
        found,
        low=min(found.low, found.value - least),
        high=max(found.high, found.value + least),
        detectable=None if found.detectable is None else max(found.detectable, least),
    )
