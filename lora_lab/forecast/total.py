"""Add up what many trials will take, from what is known already: nothing is measured."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from lora_lab.config import TrialConfig
from lora_lab.forecast.estimate import Range, forecast, mean_step
from lora_lab.forecast.fitted import constants
from lora_lab.forecast.roofline import Roofline, Speeds
from lora_lab.forecast.sources import between, half_of, of_rates, of_trials, same_settings
from lora_lab.matmul_cache import known_rate
from lora_lab.memory_cache import known_bytes
from lora_lab.store.trials import Trial
from lora_lab.telemetry.energy_figures import JOULES_PER_KWH
from lora_lab.telemetry.nvml import Card
from lora_lab.work import Workload

EARLIER, ALIKE, RATES = "from earlier trials", "from trials of the same settings", "from the card's rates"
"""The sources, best first."""

_TRAINING = ("warm_up", "window", "evaluation", "evaluation_before", "evaluation_after")
"""The phases in which the card draws the power of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A point of a sweep that is to run."""

    config: TrialConfig
    count: int
    """How often."""
    card: Card | None
    earlier: Sequence[Mapping[str, Any]]
    """Outlines of this point's finished trials on this device."""
    others: Sequence[Trial]
    """Other trials, among which some may have the same settings and other rows or another length."""
    work: Workload | None


@dataclass(frozen=True, slots=True)
class _One:
    """What one trial of a point will take."""

    source: str
    seconds: Range
    kwh: Range | None


@dataclass(slots=True)
class Total:
    """What a sweep will take, as far as it is known."""

    seconds: Range
    kwh: Range
    points: Counter[str] = field(default_factory=Counter)
    """How many points are from which source."""
    without_energy: int = 0
    """Points whose time is known and their energy is not."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Why how many points are not in it."""


_NOTHING = Range(0.0, 0.0, 0.0)


def total(points: Iterable[Asked]) -> Total:
    """Add up the points' times and energies.

    Their errors are taken to go the same way, because points of one source share what it errs by: low ends are added to
    low ends, and high ends to high ends. Independent errors would make the interval narrower."""
    found = Total(seconds=_NOTHING, kwh=_NOTHING)
    for point in points:
        one = _of_earlier(point) if point.earlier else _of_rates(point)
        if isinstance(one, str):
            found.unknown[one] += 1
            continue
        found.points[one.source] += 1
        found.seconds = _plus(found.seconds, one.seconds, point.count)
        if one.kwh is None:
            found.without_energy += 1
        else:
            found.kwh = _plus(found.kwh, one.kwh, point.count)
    return found


def speeds_of(config: TrialConfig, card: Card) -> Speeds | None:
    """Return the card's rates where both were measured here before."""
    torch = version("torch")
    matmul, memory = known_rate(card.uuid, torch, config.precision.dtype.value), known_bytes(card.uuid, torch)
    return None if matmul is None or memory is None else Speeds(matmul, memory)


def _plus(one: Range, other: Range, count: int) -> Range:
    return Range(one.value + count * other.value, one.low + count * other.low, one.high + count * other.high)


def _of_earlier(point: Asked) -> _One:
    """Return the median of a point's own trials. How far another one may be off was seen on stored repeats; whether
    card or host took longer is not asked, and the wider interval taken."""
    found = constants()
    half = between(max(found.stored.host.half, found.probe.host.half), len(point.earlier))
    joules = [each for each in (_joules(trial, point.card) for trial in point.earlier) if each is not None]
    kwh = _around(statistics.median(joules) / JOULES_PER_KWH, half) if joules else None
    seconds = statistics.median(_took(trial) for trial in point.earlier)
    return _One(EARLIER, _around(seconds, half), kwh)


def _around(value: float, half: float) -> Range:
    return Range(value, value * math.exp(-half), value * math.exp(half))


def _took(trial: Mapping[str, Any]) -> float:
    """Return the seconds of a trial without its wait for the device, which depends on what else runs."""
    return float(trial["seconds"] - trial["metrics"].get("time/waiting_seconds", 0.0))


def _joules(trial: Mapping[str, Any], card: Card | None) -> float | None:
    """Return the energy of a whole trial: its mean power while it trained, and else that of a card that waits."""
    metrics, limit = trial["metrics"], None if card is None else card.limit_watts()
    watts = metrics.get("energy/mean_power_watts")
    if watts is None or limit is None:
        return None
    training = sum(metrics.get(f"time/{phase}_seconds", 0.0) for phase in _TRAINING)
    resting = max(0.0, _took(trial) - training)
    return float(training * watts + resting * min(watts, limit * constants().power.base))


def _of_rates(point: Asked) -> _One | str:
    """Return what the card's rates say, scaled by trials of the same settings where there are some; or why they say
    nothing."""
    config, card, work = point.config, point.card, point.work
    if config.placement.kind.shares_trials:
        return "none has finished here before, and how long several cards wait for each other was not measured"
    if card is None:
        return "none has finished here before, and on a CPU nothing else tells"
    speeds = speeds_of(config, card)
    if speeds is None:
        return "none has finished here before, and `lora-lab forecast` has not measured the card's rates"
    if work is None or work.model.counted is None:
        return "their work cannot be counted"
    found = constants()
    roofline = Roofline(config, work.model, speeds, found.constants)
    step, alike = mean_step(config, work, roofline), same_settings(point.others, config, card.name)
    if alike:
        half = max(half_of(found.stored, step), half_of(found.probe, step))
        source = of_trials(alike, roofline, config, ALIKE, between(half, len(alike)))
    else:
        measured = any(kind in card.name for kind in found.cards)
        source = of_rates(step, found, card.name, measured, is_cpu=False)
    made = forecast(config, work, roofline, source, found.power, card.limit_watts())
    return _One(ALIKE if alike else RATES, made.seconds, made.kwh)
