"""Format estimates: percent for small ratios, a factor for large ones, with their uncertainty."""

import math
from dataclasses import replace

from lora_lab.report.measures import GPU_WORK, Measure
from lora_lab.report.statistics.contrasts import Contrast
from lora_lab.report.statistics.estimates import Estimate, percent

_ABSURD = math.log(10)
"""An interval that reaches further than this log ratio says only that there is too much noise for so few repeats."""

LESS_NOISE = "use longer windows (measure.steps) or more repeats"
TOO_NOISY = f"too noisy to tell; {LESS_NOISE}"

_LARGE = math.log(2)
"""From this log ratio on, a factor is easier to read than percent."""


def change(value: float, measure: Measure, signed: bool = True) -> str:
    """Return a difference in words: "+3.2 %", "x7.31", or "+0.0123 nats per token"."""
    return _written(value, measure, signed, large=abs(value) >= _LARGE)


def _written(value: float, measure: Measure, signed: bool, large: bool) -> str:
    if not measure.ratios:
        return f"{value:+.4f} {measure.unit}" if signed else f"{abs(value):.4f} {measure.unit}"
    if large:
        ratio = math.exp(value if signed else abs(value))
        return f"x{ratio:,.0f}" if ratio >= 1000 else f"x{ratio:#.3g}".rstrip(".")
    digits = 2 if measure is GPU_WORK and abs(percent(value)) < 5 else 1  # it repeats to a tenth of a percent
    return f"{percent(value):+.{digits}f} %" if signed else f"{percent(abs(value)):.{digits}f} %"


def interval(estimate: Estimate, measure: Measure) -> str:
    """Return both ends in the form of the value: "-8.0 to -1.1 %", "x7.27 to x8.06"; "" where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    large = abs(estimate.value) >= _LARGE
    low, high = (_written(end, measure, True, large) for end in (estimate.low, estimate.high))
    return f"{low.removesuffix(' %').removesuffix(f' {measure.unit}')} to {high}"


def format_estimate(
    estimate: Estimate, measure: Measure, lowest: float | None = None, highest: float | None = None
) -> str:
    """Return the change with its interval, or that none was seen and how large one would have been detected.

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
    if is_absurd(estimate, measure):
        return TOO_NOISY
    if estimate.seen is False and estimate.detectable is not None:
        would = detectable_text(estimate.detectable, measure)
        return f"no difference seen (95 %: {ends}); {would} would have been detected (80 % power)"
    return f"{change(estimate.value, measure)} (95 %: {ends})"


def detectable_text(detectable: float, measure: Measure) -> str:
    """Return the smallest detectable difference in words: "3.2 %", "a ratio of 5.75", "0.0123 nats per token"."""
    text = change(detectable, measure, signed=False)
    return f"a ratio of {text[1:]}" if text.startswith("x") else text


def is_absurd(estimate: Estimate, measure: Measure) -> bool:
    """Return whether the interval is too wide to be worth printing.

    An interval that contains no difference may not reach beyond a factor of 10 either way. One that does not contain it
    may not reach beyond a factor of 10 from the estimate: an effect of x15 with a narrow interval is printed."""
    if not measure.ratios or estimate.low is None or estimate.high is None:
        return False
    center = estimate.value if estimate.seen else 0.0
    return max(center - estimate.low, estimate.high - center) > _ABSURD


def interval_note(contrast: Contrast) -> str:
    """Return a note on what a contrast's interval holds for; "" where that is sessions like it and nothing narrower is
    known."""
    if contrast.interval_over == "settings":
        return "some settings ran once: the interval also includes how the effect differs between settings"
    ends = (
        "" if is_absurd(contrast.this_session, contrast.measure) else interval(contrast.this_session, contrast.measure)
    )
    if contrast.sessions_like_it is None:
        return "this interval holds for this session alone; three repeats give one for others" if ends else ""
    return f"for this session alone: {ends}" if ends and contrast.interval_over == "blocks" else ""
