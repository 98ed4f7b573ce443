"""The record of a trial: one record, the same for every tracker, built from plain data."""

import dataclasses
import time
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lora_lab.config import TrialConfig
from lora_lab.events import HELDOUT, DataCounted, Evaluated, Event, PhaseBegan, Ran, Step
from lora_lab.options import EngineKind
from lora_lab.outcome import End, Outcome
from lora_lab.phase import Phase
from lora_lab.quality.row_losses import TAG, HeldoutRows
from lora_lab.secrets import without_secrets
from lora_lab.store.naming import OPTIONS, point_name
from lora_lab.telemetry.attempts import counting
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.phases import TRAINING
from lora_lab.telemetry.quality import evaluated_rows
from lora_lab.telemetry.sampler import Sample

RUNNING = "running"
"""The outcome of a record that has none yet."""


ORPHAN = "orphan"
"""The tag of a run that was ended without its record. If the record turns up later, it goes into this run."""


KINDS = "data_kinds"
"""The tag that says whether a trial's rows were conversations, passages or both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value of a series. `t_ms` is Unix time."""

    key: str
    value: float
    step: int
    t_ms: int


@dataclass(slots=True, kw_only=True)
class Record:
    """The record of one trial, or of one sweep above its trials, as a tracker takes it."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Made by lora_lab before any store is asked. It makes delivering twice the same as delivering once."""
    parent: str | None = None
    """The id of the sweep's record, for a trial of a sweep."""
    is_sweep: bool = False
    """A sweep's record changes when the sweep is continued. A trial's record is final, but for tags that its sweep adds
    to it (halving)."""
    name: str
    params: dict[str, str]
    chosen: list[str] = field(default_factory=list)
    """The params that the user chose: MLflow shows these. Empty means all of them."""
    outcome: str = RUNNING
    started_ms: int = field(default_factory=lambda: round(time.time() * 1e3))
    """Unix time."""
    ended_ms: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    series: list[Point] = field(default_factory=list)


def run_name(config: TrialConfig, choices: dict[str, str]) -> str:
    """Return the name of a trial that belongs to no sweep.

    The eager engine is left out to keep names short. Everything ran with it before there was a choice."""
    groups = [group for group in OPTIONS if group not in ("data", "engine")]
    if choices["engine"] != EngineKind.eager.name:
        groups.append("engine")
    shape = {"batch_size": str(config.batch_size), "seq_len": str(config.seq_len)}
    return point_name({group: choices[group] for group in groups} | shape)


def plain(config: TrialConfig) -> dict[str, Any]:
    """Return the config as yaml has it: nested dictionaries, enums by name, no passwords."""

    def node(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): node(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [node(inner) for inner in value]
        if isinstance(value, Enum):
            return value.name
        return without_secrets(value) if isinstance(value, str) else value

    tree: dict[str, Any] = node(dataclasses.asdict(config))
    return tree


def params(config: TrialConfig, choices: dict[str, str]) -> dict[str, str]:
    """Return the chosen option of each group under its plain name, and every leaf under its dotted key."""
    return dict(choices) | dict(_leaves(plain(config), ""))


_ALWAYS_SHOWN = ("batch_size", "seq_len", "learning_rate", "repeat")


def chosen(config: TrialConfig, choices: dict[str, str], overrides: Sequence[str]) -> list[str]:
    """Return the params that the user chose.

    These are each group's option, what the command line sets, and what differs from the default outside the groups. All
    others follow from the options."""
    named = {override.lstrip("+~").partition("=")[0] for override in overrides} - choices.keys()
    default, asked = plain(TrialConfig()), plain(config)
    named |= {key for key, value in asked.items() if not isinstance(value, dict) and value != default[key]}
    leaves = (key for key in params(config, {}) if any(key == name or key.startswith(f"{name}.") for name in named))
    return sorted({*choices, *_ALWAYS_SHOWN, *leaves})


def _leaves(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key, str(node)


def complete(
    record: Record,
    end: End,
    events: Sequence[Event],
    samples: Sequence[Sample],
    summary: Summary,
    unix_minus_monotonic: float,
) -> None:
    """Add everything that is known at the end to `record`.

    Args:
        unix_minus_monotonic: seconds that turn an event's `t` into Unix time.
    """
    record.outcome = end.outcome.value
    if events:
        record.ended_ms = round((max(event.t for event in events) + unix_minus_monotonic) * 1e3)
    phase = next((event.phase for event in reversed(events) if isinstance(event, PhaseBegan)), Phase.start.value)
    record.tags |= {"outcome": end.outcome.value, "phase": "done" if end.outcome is Outcome.finished else phase}
    if end.reason:
        record.tags["reason"] = end.reason
    step = end.step if end.outcome is not Outcome.finished else None
    if step is None and end.outcome is not Outcome.finished and phase in TRAINING:
        step = 1 + max((event.step for event in counting(events) if isinstance(event, Step)), default=0)
    if step is not None:
        record.tags["step"] = str(step)
    for ran in (event for event in events if isinstance(event, Ran)):
        record.tags |= {f"ran.{key}": value for key, value in ran.facts.items()}
        record.tags["stand_ins"] = "; ".join(ran.stand_ins) or "none"
    for counted in (event for event in events if isinstance(event, DataCounted)):
        record.metrics |= {
            f"data/{key}": float(value)
            for key, value in dataclasses.asdict(counted).items()
            if key.startswith(("rows", "length", "tokens")) and value is not None
        }
        record.tags["data_digest"] = counted.digest
        if counted.end_of_turn:
            record.tags["data_end_of_turn"] = counted.end_of_turn
        if counted.kinds:
            record.tags[KINDS] = counted.kinds
    evaluated = evaluated_rows(events, HELDOUT, Phase.evaluation_after)
    if evaluated is not None:
        rows = HeldoutRows(digest=evaluated.digest, nats=tuple(evaluated.nats), tokens=tuple(evaluated.tokens))
        record.tags[TAG] = rows.written()
    record.metrics |= summary.metrics
    record.tags |= {f"absent.{name}": why for name, why in summary.absent.items()}
    record.tags |= summary.tags
    if summary.warnings:
        record.tags["warnings"] = "; ".join(summary.warnings)
    series = [
        *event_series(counting(events), samples, unix_minus_monotonic),
        *_card_series(samples, unix_minus_monotonic),
    ]
    record.series = thinned(series)


def event_series(events: Iterable[Event], samples: Sequence[Sample], offset: float) -> Iterator[Point]:
    """Yield the points of each step, and of each evaluation between two steps. A point depends on its own event and the
    readings before it alone, so that a running job can send it ahead of its record.

    Args:
        offset: seconds that turn an event's `t` into Unix time.
    """
    for event in events:
        if isinstance(event, Step):
            yield from _of_step(event, samples, round((event.t + offset) * 1e3))
        elif isinstance(event, Evaluated) and event.step is not None:
            t_ms = round((event.t + offset) * 1e3)
            yield Point(key="heldout/loss", value=event.loss, step=event.step, t_ms=t_ms)


def _of_step(step: Step, samples: Sequence[Sample], t_ms: int) -> Iterator[Point]:
    yield Point(key="step/loss", value=step.loss, step=step.step, t_ms=t_ms)
    if step.seconds:
        yield Point(key="step/seconds", value=step.seconds, step=step.step, t_ms=t_ms)
        rate = step.real / step.seconds
        yield Point(key="step/tokens_per_second", value=rate, step=step.step, t_ms=t_ms)
    if step.learning_rate is None:
        return  # the step of a window
    yield Point(key="step/learning_rate", value=step.learning_rate, step=step.step, t_ms=t_ms)
    watts = _watts_at(step.t, samples)
    if watts is not None:
        yield Point(key="step/power_watts", value=watts, step=step.step, t_ms=t_ms)


def _watts_at(t: float, samples: Sequence[Sample]) -> float | None:
    """Return the card's power by the last reading before `t`; None when the readings with power end long before."""
    last = bisect_right(samples, t, key=lambda sample: sample.t)
    readings = (samples[number] for number in range(last - 1, max(-1, last - 1 - _READINGS_BACK), -1))
    return next((watts for sample in readings if (watts := _watts(sample)) is not None), None)


_READINGS_BACK = 10


def _watts(sample: Sample) -> float | None:
    return sample.average_watts if sample.instant_watts is None else sample.instant_watts


_CARD_SERIES: dict[str, Callable[[Sample], float | None]] = {
    "card/power_watts": _watts,
    "card/used_gib": lambda s: None if s.used_bytes is None else s.used_bytes / GIB,
    "card/celsius": lambda s: s.temperature_celsius,
    "card/sm_mhz": lambda s: s.sm_mhz,
}
_MOST_POINTS = 500


def _card_series(samples: Sequence[Sample], offset: float) -> Iterator[Point]:
    for key, value_of in _CARD_SERIES.items():
        told = [(sample.t, value) for sample in samples if (value := value_of(sample)) is not None]
        every = max(1, len(told) // _MOST_POINTS)  # the whole series is in samples.jsonl
        for number, (t, value) in enumerate(told[::every]):
            yield Point(key=key, value=value, step=number, t_ms=round((t + offset) * 1e3))


MOST_POINTS_PER_KEY = 2000
"""A store shows no more points of a series than this; events.jsonl has all of them."""


def thinned(series: Sequence[Point], most: int = MOST_POINTS_PER_KEY) -> list[Point]:
    """Return at most `most` points of each series, evenly, the first and the last among them."""
    lengths = Counter(point.key for point in series)
    kept = {key: {round(n * (length - 1) / (most - 1)) for n in range(most)} for key, length in lengths.items()}
    places: Counter[str] = Counter()
    found: list[Point] = []
    for point in series:
        if lengths[point.key] <= most or places[point.key] in kept[point.key]:
            found.append(point)
        places[point.key] += 1
    return found
