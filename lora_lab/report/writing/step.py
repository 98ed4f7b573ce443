"""The change of the step's time in words."""

from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.step_split import StepSplit

_LITTLE = 0.2
"""Below this share of the step's change the idle time's part is not worth a sentence."""


def step_sentence(split: StepSplit) -> str:
    """Say in plain words what became longer, and what of it carries over to another host."""
    step, idle = split.step.value, split.idle.value
    unchanged = split.gpu.seen is False
    works = "no change of the GPU's work was seen" if unchanged else f"the GPU works {_longer(split.gpu, 'less')}"
    if split.step.seen is False:
        return f"No difference in step time was seen; {works}."
    steps = f"Steps are {_longer(split.step)}"
    if abs(idle) < _LITTLE * abs(step):
        return f"{steps}, nearly all of it the GPU's work, which another host with this card has, too."
    rest = (
        f"{'it' if unchanged else 'the rest'} is idle time"
        if (idle > 0) == (step > 0)
        else f"idle time is {_longer(split.idle)}"
    )
    return f"{steps}; {works}, {rest}, which another host may not have."


def _longer(seconds: Estimate, shorter: str = "shorter") -> str:
    size = 1e3 * abs(seconds.value)
    return f"{size:.{0 if size >= 10 else 1}f} ms {'longer' if seconds.value > 0 else shorter}"


def split_text(split: StepSplit) -> str:
    """Return how much longer a step is, and how much of that is the GPU's own work."""
    return f"step {_ms(split.step)}, of it GPU work {_ms(split.gpu)} and idle time {_ms(split.idle)}"


def _ms(seconds: Estimate) -> str:
    digits = 1 if abs(seconds.value) >= 0.01 else 2
    if seconds.low is None or seconds.high is None:
        return f"{1e3 * seconds.value:+.{digits}f} ms"
    low, high = (f"{1e3 * end:+.{digits}f}" for end in (seconds.low, seconds.high))
    return f"{1e3 * seconds.value:+.{digits}f} ms ({low} to {high})"
