"""Estimates as people say them: percent for small ratios, a factor for large ones, and how sure."""

import math
from dataclasses import replace

from lora_lab.report.measures import Measure
from lora_lab.report.statistics.estimates import Estimate, percent

_LARGE = math.log(2)
"""From this log ratio on, a factor is easier to read than percent."""


def change(value: float, measure: Measure, signed: bool = True) -> str:
    """A difference: "+3.2 %", "x7.31", or "+0.0123 nats a token"."""
    return _written(value, measure, signed, large=abs(value) >= _LARGE)


def _written(value: float, measure: Measure, signed: bool, large: bool) -> str:
    if not measure.ratios:
        return f"{value:+.4f} {measure.unit}" if signed else f"{abs(value):.4f} {measure.unit}"
    if large:
        ratio = math.exp(value if signed else abs(value))
        return f"x{ratio:,.0f}" if ratio >= 1000 else f"x{ratio:#.3g}".rstrip(".")
    return f"{percent(value):+.1f} %" if signed else f"{percent(abs(value)):.1f} %"


def interval(estimate: Estimate, measure: Measure) -> str:
    """Both ends in the manner of the value: "-8.0 to -1.1 %", "x7.27 to x8.06"; "" where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    large = abs(estimate.value) >= _LARGE
    low, high = (_written(end, measure, True, large) for end in (estimate.low, estimate.high))
    return f"{low.removesuffix(' %').removesuffix(f' {measure.unit}')} to {high}"


def format_estimate(
    estimate: Estimate, measure: Measure, lowest: float | None = None, highest: float | None = None
) -> str:
    """The change with its interval, or that none was seen and which one would have been.

    Args:
        lowest: the least change in any setting of the rest, where that is known.
        highest: the largest."""
    ends = interval(estimate, measure)
    if not ends:
        return f"{change(estimate.value, measure)} ({estimate.why_no_interval})"
    if estimate.low == estimate.high:
        if lowest == highest:
            return "the same in every trial" if not estimate.value else f"{change(estimate.value, measure)}, always"
        ends = interval(replace(estimate, low=lowest, high=highest), measure)
        return f"{change(estimate.value, measure)} ({ends} by setting, the same in every repeat)"
    if estimate.seen is False and estimate.detectable is not None:
        would = change(estimate.detectable, measure, signed=False)
        return f"no difference seen (95 %: {ends}); {would} would have been seen 4 times in 5"
    return f"{change(estimate.value, measure)} (95 %: {ends})"


def interval_note(over: str, by_blocks: Estimate | None, measure: Measure) -> str:
    """What is to be known of a contrast's interval beyond its ends; "" where it is over repeats alone.

    Args:
        over: Contrast.interval_over.
        by_blocks: Contrast.by_blocks."""
    if over == "settings":
        return "some settings ran once: the interval holds how the effect differs between settings, too"
    if over == "blocks":
        return "the difference changed from block to block: the interval is over blocks"
    ends = interval(by_blocks, measure) if by_blocks is not None else ""
    return f"counted by blocks: {ends}" if ends and by_blocks and by_blocks.low != by_blocks.high else ""


def format_short(estimate: Estimate, measure: Measure) -> str:
    """The same in fewer words."""
    if estimate.seen is False and estimate.detectable is not None and estimate.low != estimate.high:
        return f"no difference seen ({change(estimate.detectable, measure, signed=False)} would have been)"
    ends = interval(estimate, measure)
    return change(estimate.value, measure) + (f" ({ends})" if ends else f" ({estimate.why_no_interval})")
