"""The change of the step's time in words."""

from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.step_split import StepSplit


def split_text(split: StepSplit) -> str:
    """Return how much longer a step is, and how much of that is the GPU's own work."""
    return f"step {_ms(split.step)}, of it GPU work {_ms(split.gpu)} and idle time {_ms(split.idle)}"


def _ms(seconds: Estimate) -> str:
    digits = 1 if abs(seconds.value) >= 0.01 else 2
    if seconds.low is None or seconds.high is None:
        return f"{1e3 * seconds.value:+.{digits}f} ms"
    low, high = (f"{1e3 * end:+.{digits}f}" for end in (seconds.low, seconds.high))
    return f"{1e3 * seconds.value:+.{digits}f} ms ({low} to {high})"
