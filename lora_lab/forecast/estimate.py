"""Add up a trial's time in parts, and its energy."""

import math
from collections import Counter
from dataclasses import dataclass

from lora_lab.config import TrialConfig
from lora_lab.forecast.fitted import Power
from lora_lab.forecast.roofline import Roofline, StepTime
from lora_lab.forecast.sources import Source
from lora_lab.options import EngineKind
from lora_lab.telemetry.energy_figures import JOULES_PER_KWH
from lora_lab.telemetry.flops import PASSES, attention_forward, products, repeated_products, repeated_share
from lora_lab.work import MicroBatch, Workload

_GUESSED = math.log(2)
"""Half the interval of what was fitted on a few trials only: half to twice."""

_START = 8.0
"""Seconds of a start without the model: processes, imports, MLflow's store and Trainer. 14 and 15 s were seen on a
machine that had just started, 3 s on one that had everything in memory."""
_WEIGHTS_PER_SECOND = 1e9
"""16-bit weights that are read and converted; 8 B took 8 s on an H100's host."""
_COMPILE_SECONDS = 13.0
"""For each length of rows; 5 to 20 s on an H100's host."""
_CHECKPOINT_SECONDS = 0.7
_MOST_TOKENS = 128
_TOKENS_OF_ANSWER = _MOST_TOKENS / 2
"""On average, for answers end earlier than they have to. Jobs that shared an H200 took this long."""


@dataclass(frozen=True, slots=True)
class Range:
    """A number with its 90 % interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Range":
        """Return the same in another unit."""
        return Range(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a trial's time."""

    name: str
    seconds: float
    half: float
    """Half its interval, as a logarithm."""
    is_steady: bool
    """Whether the card draws the power of training meanwhile."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a trial will take."""

    work: Workload
    source: Source
    step: StepTime
    """Of a mean step, by the roofline."""
    step_seconds: float
    """Of a mean step, by the source."""
    parts: list[Part]
    operations: float
    """Of all steps."""
    kwh: Range | None
    no_kwh: str
    """Why there is no kWh."""

    @property
    def seconds(self) -> Range:
        """Return the whole time."""
        return _sum(self.parts)

    @property
    def epoch_seconds(self) -> float:
        """Return the time of the steps of one epoch."""
        return self.step_seconds * self.work.epoch_in_full_steps


def forecast(
    config: TrialConfig,
    work: Workload,
    roofline: Roofline,
    source: Source,
    power: Power,
    limit_watts: float | None,
) -> Forecast:
    """Return what a trial will take.

    Args:
        limit_watts: the most that the card may draw; None where that is not known, or for a CPU.
    """
    step = mean_step(config, work, roofline)
    seconds = step.seconds * source.scale
    parts = _parts(config, work, roofline, source, seconds)
    kwh, no_kwh = _energy(parts, source, step, power, limit_watts)
    return Forecast(work, source, step, seconds, parts, operations(config, work), kwh, no_kwh)


def mean_step(config: TrialConfig, work: Workload, roofline: Roofline) -> StepTime:
    """Return the mean time of a step over an epoch. Micro-batches of one shape take the same time."""
    shapes = Counter((batch.rows, batch.width) for batch in work.epoch)
    card = host = 0.0
    waiting = 0.0
    for (rows, width), count in shapes.items():
        slots = rows * width
        one = roofline.step([MicroBatch(rows, width, slots, slots, rows * width**2)])
        card += one.card * count
        host += one.host * count
        waiting = one.waiting
    each = config.grad_accum_steps / len(work.epoch)
    return StepTime(card * each, host * each, waiting)


def operations(config: TrialConfig, work: Workload) -> float:
    """Return the operations of all steps: what flops/per_token counts for the real tokens, and what checkpointing
    repeats of it."""
    counted = work.model.counted
    if counted is None:
        raise ValueError("the model's products are not counted")
    real = sum(batch.real for batch in work.epoch)
    causal = attention_forward(counted, sum(batch.attended for batch in work.epoch)) / 2
    again = repeated_share(config.gradient_checkpointing.name, work.model.layers)
    epoch = products(counted, real) + causal * PASSES[False] + again * (repeated_products(counted, real) + causal)
    return epoch * work.steps / work.steps_per_epoch


def _parts(config: TrialConfig, work: Workload, roofline: Roofline, source: Source, step: float) -> list[Part]:
    counted = work.model.counted
    weights = counted.weight_elements if counted is not None else 0
    lengths = len({batch.width for batch in work.epoch})
    evaluation = roofline.evaluation(work.heldout) * source.scale
    general = roofline.evaluation(work.general) * source.scale
    full_steps = work.steps * work.epoch_in_full_steps / work.steps_per_epoch
    parts = [
        Part("start and loading", _START + weights / _WEIGHTS_PER_SECOND, _GUESSED, False),
        Part(f"{work.steps:,} steps", full_steps * step, source.half, True),
    ]
    if config.engine.kind in (EngineKind.compile, EngineKind.graph):
        parts.insert(1, Part(f"compiling for {lengths} row lengths", lengths * _COMPILE_SECONDS, _GUESSED, False))
    if work.heldout or work.general:
        # before and after, and in a job between its steps
        seconds = (work.evaluations + 2) * evaluation + 2 * general
        parts.append(Part(f"{work.evaluations + 2} evaluations", seconds, max(source.half, _GUESSED), True))
    if work.checkpoints:
        saving = work.checkpoints * _CHECKPOINT_SECONDS
        parts.append(Part(f"{work.checkpoints} checkpoints", saving, _GUESSED, False))
    if work.answers:
        one = roofline.evaluation([MicroBatch(1, 1, 1, 1, 1)]) * source.scale
        tokens = _answer_batches(config, work) * _TOKENS_OF_ANSWER
        parts.append(Part(f"{work.answers} answers", tokens * one, _GUESSED, False))
    return parts


def _answer_batches(config: TrialConfig, work: Workload) -> int:
    """Return the batches of prompts, of the base and the tuned model together: worker/answers.py."""
    length = (work.data.length_median or config.seq_len) + _MOST_TOKENS
    at_once = max(8, 2 * config.batch_size * config.seq_len // length)
    return 2 * math.ceil(work.answers / 2 / at_once)


def _sum(parts: list[Part]) -> Range:
    """Return the sum with its interval. The parts' errors are taken to be independent."""
    value = sum(part.seconds for part in parts)
    below = math.sqrt(sum((part.seconds * -math.expm1(-part.half)) ** 2 for part in parts))
    above = math.sqrt(sum((part.seconds * math.expm1(part.half)) ** 2 for part in parts))
    return Range(value, value - below, value + above)


def _energy(
    parts: list[Part], source: Source, step: StepTime, power: Power, limit_watts: float | None
) -> tuple[Range | None, str]:
    """Return the card's kWh, or why they are not known. Outside training the card is taken to draw its base power."""
    if limit_watts is None and source.watts is None:
        return None, "the power of this device is not measured"
    share = step.card / step.seconds
    steady = source.watts if source.watts is not None else (limit_watts or 0.0) * (power.base + power.slope * share)
    resting = min(steady, (limit_watts or steady) * power.base)
    joules = sum(part.seconds * (steady if part.is_steady else resting) for part in parts)
    time = _sum(parts)
    uncertain = 0.0 if source.watts is not None else power.judged.half
    below = math.hypot(math.log(time.value / time.low), uncertain)
    above = math.hypot(math.log(time.high / time.value), uncertain)
    kwh = joules / JOULES_PER_KWH
    return Range(kwh, kwh * math.exp(-below), kwh * math.exp(above)), ""
