"""A change of the step's time in two parts: the GPU's own work, and the time in which it stands idle.

The GPU's work belongs to the card and the configuration, and carries over to another host with the same card. Idle time
belongs to the host, which was late with the next kernel, and to the code that waits; another host may not have it.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_lab.report.measures import BUSY_SHARE, GPU_WORK
from lora_lab.report.statistics.averages import average
from lora_lab.report.statistics.blocks import Block
from lora_lab.report.statistics.differences import Difference
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.pairs import PairedSetting
from lora_lab.store.trials import Trial

_STEPS_PER_SECOND = "throughput/steps_per_second"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSplit:
    """By how many seconds the mean step is longer, and in which part: step = gpu + idle.

    Each is averaged over the settings of everything else, with its headline interval."""

    step: Estimate
    gpu: Estimate
    idle: Estimate
    pairs: int
    """Pairs of profiled trials that it is made of."""


@dataclass(frozen=True, slots=True)
class _Seconds:
    """Of one step of one trial, on average over its window."""

    step: float
    gpu: float

    @property
    def idle(self) -> float:
        return self.step - self.gpu


_Sides = tuple[list[_Seconds], list[_Seconds]]
"""`over`'s trials and `of`'s, of one block."""


def step_split(settings: Sequence[PairedSetting]) -> StepSplit | str:
    """Split the change of the step's time over the pairs whose trials were all profiled; without any, return why."""
    profiled = [pairs for pairs in map(_profiled, settings) if pairs]
    if not profiled:
        return _why_absent(settings)
    return StepSplit(
        step=average([_difference(pairs, lambda each: each.step) for pairs in profiled]).estimate,
        gpu=average([_difference(pairs, lambda each: each.gpu) for pairs in profiled]).estimate,
        idle=average([_difference(pairs, lambda each: each.idle) for pairs in profiled]).estimate,
        pairs=sum(map(len, profiled)),
    )


def _profiled(setting: PairedSetting) -> dict[Block, _Sides]:
    [blocks] = setting.difference.samples
    found = {}
    for block, (over, of) in zip(blocks, setting.pairs, strict=True):
        before, after = ([seconds for trial in side if (seconds := _seconds(trial))] for side in (over, of))
        if len(before) == len(over) and len(after) == len(of):
            found[block] = (before, after)
    return found


def _seconds(trial: Trial) -> _Seconds | None:
    """Return the mean step of the window, and the GPU's part of it: the busy share, which is scaled by slots, so that
    profiled rows of another length than the window's do not count."""
    share, rate = (trial.metrics.get(key) for key in (BUSY_SHARE, _STEPS_PER_SECOND))
    return None if share is None or not rate else _Seconds(step=1 / rate, gpu=share / rate)


def _difference(pairs: Mapping[Block, _Sides], part: Callable[[_Seconds], float]) -> Difference:
    apart = {
        block: statistics.fmean(map(part, of)) - statistics.fmean(map(part, over))
        for block, (over, of) in pairs.items()
    }
    return Difference(value=statistics.fmean(apart.values()), samples=(apart,))


def _why_absent(settings: Sequence[PairedSetting]) -> str:
    """Return the reason that most trials give."""
    reasons = Counter(
        GPU_WORK.why_absent(trial) for setting in settings for trial in setting.trials if _seconds(trial) is None
    )
    return reasons.most_common(1)[0][0]
