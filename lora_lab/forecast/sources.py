"""Where a step's time comes from: trials of the same settings on this card, else the card's rates."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_lab.config import TrialConfig
from lora_lab.forecast.fitted import ByRegime, Constants
from lora_lab.forecast.roofline import Roofline, StepTime
from lora_lab.store.record import params
from lora_lab.store.trials import Trial
from lora_lab.work import MicroBatch

_SETTINGS = ("optimizer.", "precision.", "engine.", "method.", "model.", "attention", "gradient_checkpointing")
_SIZES = ("batch_size", "grad_accum_steps", "seq_len", "data.batching")
_WITHOUT_EFFECT = (
    "optimizer.weight_decay",
    "method.alpha",
    "method.alpha_pattern",
    "method.use_rslora",
    "method.b_learning_rate_ratio",
    "model.trust_remote_code",
)

UNKNOWN_CARD = 2.0
"""Assumed: the interval of a card of another kind is this many times as wide as that of the measured ones."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a step's time is taken from."""

    name: str
    scale: float
    """The measured time over the roofline's; 1 without a measurement."""
    half: float
    """Half the 90 % interval of the time, as a logarithm."""
    watts: float | None = None
    """The card's mean power in the measured steps."""


def same_settings(trials: Iterable[Trial], config: TrialConfig, device: str) -> list[Trial]:
    """Return the finished trials of these settings on this device alone, whatever rows they had."""
    asked = {key: text for key, text in params(config, {}).items() if _matters(key)}
    return [
        trial
        for trial in trials
        if trial.finished
        and trial.place.device == device
        and "world_size" not in trial.tags
        and not trial.is_member
        and "throughput/steps_per_second" in trial.metrics
        and trial.tags.get("validity") != "invalid"
        and all(trial.params.get(key) == text for key, text in asked.items())
    ]


def _matters(key: str) -> bool:
    return key.startswith((*_SETTINGS, *_SIZES)) and not key.startswith(_WITHOUT_EFFECT)


def of_trials(trials: Sequence[Trial], roofline: Roofline, config: TrialConfig, name: str, half: float) -> Source:
    """Return a source that scales the roofline's times by those of trials. How much their own steps varied is added to
    the interval: where other programs run, steps vary.

    Args:
        half: half the interval of a forecast from these trials, as a logarithm.
    """
    scales = [_scale(trial, roofline, config) for trial in trials]
    half = math.hypot(half, _own_error(trials))
    watts = [trial.metrics["energy/mean_power_watts"] for trial in trials if "energy/mean_power_watts" in trial.metrics]
    return Source(name, statistics.geometric_mean(scales), half, statistics.fmean(watts) if watts else None)


def _own_error(trials: Sequence[Trial]) -> float:
    """Return half the interval of the trials' mean speed that follows from their own steps, as a logarithm; 0 where no
    trial was long enough to say."""
    name = "throughput/tokens_per_second"
    known = [t.metrics[f"{name}_error"] / t.metrics[name] for t in trials if f"{name}_error" in t.metrics]
    return math.log1p(statistics.fmean(known)) / math.sqrt(len(known)) if known else 0.0


def _scale(trial: Trial, roofline: Roofline, config: TrialConfig) -> float:
    """Return a trial's measured time of a step over the roofline's, at the trial's mean width of rows."""
    per_second = trial.metrics["throughput/steps_per_second"]
    slots = trial.metrics["throughput/slots_per_second"] / per_second
    width = max(1, round(slots / config.batch_size / config.grad_accum_steps))
    rows = config.batch_size
    batch = MicroBatch(rows, width, rows * width, rows * width, rows * width**2)
    return 1 / per_second / roofline.step([batch] * config.grad_accum_steps).seconds


def of_rates(time: StepTime, found: Constants, device: str, is_measured_kind: bool, is_cpu: bool) -> Source:
    """Return the roofline as a source, with the interval that held-out trials have given it."""
    if is_cpu:
        return Source("this CPU's rates", 1.0, found.cpu.judged.half)
    half = half_of(found.roofline, time) * (1 if is_measured_kind else UNKNOWN_CARD)
    return Source(f"the rates of {device}", 1.0, half)


def half_of(errors: ByRegime, time: StepTime) -> float:
    """Return half the interval where this step's time lies: with the card or with the host."""
    return (errors.card if time.card >= time.host else errors.host).half


def between(half: float, count: int) -> float:
    """Return half the interval of a forecast from `count` trials, of which each differs from the next by `half`: their
    mean differs from another trial by less."""
    return half * math.sqrt((1 + 1 / count) / 2)
