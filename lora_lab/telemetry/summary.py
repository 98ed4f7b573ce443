"""All summary figures of a trial: a pure function of what the worker said and the card showed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_lab.events import Ended, Evaluated, Event, Phase, PhaseBegan, PhaseMemory, Step, Warned
from lora_lab.outcome import Outcome
from lora_lab.telemetry.durations import durations
from lora_lab.telemetry.energy import window_energy
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.throughput import throughput
from lora_lab.telemetry.window import Window, find_window

GIB = 2**30


@dataclass(slots=True)
class Summary:
    """Figures by metric name, and for every figure that is missing the reason."""

    metrics: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    energy_source: str = "none"

    def add(self, name: str, value: float | None, reason: str) -> None:
        """Keep a figure, or why there is none."""
        if value is None:
            self.absent[name] = reason
        else:
            self.metrics[name] = value


def summarise(events: Sequence[Event], samples: Sequence[Sample], no_sensor: str, asked_t: float) -> Summary:
    """Figures of one trial.

    Args:
        events: everything the worker said, in order.
        samples: what the card showed meanwhile; empty without a sensor.
        no_sensor: why there are no samples, or none up to the end, for the figures that need them.
        asked_t: time.monotonic() seconds when the trial was asked for.
    """
    summary = Summary(warnings=[event.text for event in events if isinstance(event, Warned)])
    window = find_window(events)
    _add_throughput(summary, window)
    _add_vram(summary, events, samples, no_sensor)
    _add_energy(summary, window, samples, no_sensor)
    _add_losses(summary, events, window)
    summary.metrics |= durations(events, asked_t)
    _add_limits(summary, events, samples)
    return summary


def _add_limits(summary: Summary, events: Sequence[Event], samples: Sequence[Sample]) -> None:
    """What the whole trial, not its training alone, peaked at, and for an out-of-memory what was asked for last."""
    ended = next((event for event in events if isinstance(event, Ended)), None)
    if ended is not None and ended.peak_host_bytes is not None:
        summary.metrics["host/peak_gib"] = ended.peak_host_bytes / GIB
    if ended is None or ended.outcome != Outcome.out_of_memory.value:
        return
    why = "the allocator did not say"
    summary.add("out_of_memory/asked_gib", None if ended.asked_bytes is None else ended.asked_bytes / GIB, why)
    allocated = max((e.peak_allocated_bytes / GIB for e in events if isinstance(e, PhaseMemory)), default=None)
    summary.add("out_of_memory/peak_allocated_gib", allocated, "torch's allocator reports on GPUs only")
    used = max((sample.used_bytes / GIB for sample in samples if sample.used_bytes is not None), default=None)
    summary.add("out_of_memory/peak_device_gib", used, "no card's memory was read")


def _add_throughput(summary: Summary, window: Window | None) -> None:
    if window is None:
        for name in ("throughput/tokens_per_second", "throughput/seconds_per_10k_tokens"):
            summary.absent[name] = "the measured window was not completed"
        return
    summary.metrics.update(throughput(window))
    share = summary.metrics["tokens/real_share"]
    if share < 0.5:
        summary.warnings.append(
            f"{1 - share:.0%} of the token slots were padding; data.batching=longest or packed wastes less"
        )
    trained = summary.metrics["tokens/trained_share"] / share
    if trained < 0.1:
        summary.warnings.append(f"only {trained:.0%} of the real tokens were trained on; the rest is prompt")
    skipped = sum(step.skipped for step in window.steps)
    if skipped:
        summary.metrics["window/steps_skipped"] = float(skipped)
        summary.warnings.append(
            f"{skipped} of {len(window.steps)} measured steps overflowed fp16 and changed no weight"
        )


def _add_vram(summary: Summary, events: Sequence[Event], samples: Sequence[Sample], no_sensor: str) -> None:
    phases = {Phase.warm_up.value, Phase.window.value}
    told = {event.phase: event for event in events if isinstance(event, PhaseMemory)}
    begun = {event.phase for event in events if isinstance(event, PhaseBegan)} & phases
    if no_sensor and not told:
        why = "torch's allocator reports on GPUs only"
    elif begun <= told.keys():
        why = "no training step was reached"
    else:
        why = "the worker was gone before it could report the allocator's peak"
    training = [told[phase] for phase in begun] if begun <= told.keys() else []
    allocated = max((memory.peak_allocated_bytes / GIB for memory in training), default=None)
    reserved = max((memory.peak_reserved_bytes / GIB for memory in training), default=None)
    summary.add("vram/peak_allocated_gib", allocated, why)
    summary.add("vram/peak_reserved_gib", reserved, why)
    start, end = _training_times(events)
    used = max((s.used_bytes / GIB for s in samples if s.used_bytes is not None and start <= s.t <= end), default=None)
    # a sensor that failed on the way has not seen the rest of the training
    seen = not no_sensor or (bool(samples) and samples[-1].t >= end)
    summary.add(
        "vram/peak_device_gib", used if seen else None, no_sensor or "no reading of used memory fell into training"
    )


def _training_times(events: Sequence[Event]) -> tuple[float, float]:
    """When training began and ended, in seconds; loading and evaluation lie outside."""
    begins = {event.phase: event.t for event in events if isinstance(event, PhaseBegan)}
    start = begins.get(Phase.warm_up.value, math.inf)
    after = [t for t in begins.values() if t > begins.get(Phase.window.value, start)]
    return start, min(after, default=math.inf)


def _add_energy(summary: Summary, window: Window | None, samples: Sequence[Sample], no_sensor: str) -> None:
    if not samples:
        summary.absent["energy/joules_per_token"] = no_sensor or "no sensor was read"
        return
    if window is None:
        summary.absent["energy/joules_per_token"] = "the measured window was not completed"
        return
    energy = window_energy(window, samples)
    summary.energy_source = energy.source
    if energy.joules is None:
        summary.absent["energy/joules_per_token"] = no_sensor or energy.reason
        return
    summary.metrics["energy/joules"] = energy.joules
    summary.metrics["energy/joules_per_token"] = energy.joules / sum(step.real for step in window.steps)
    summary.metrics["energy/mean_power_watts"] = energy.joules / window.seconds


def _add_losses(summary: Summary, events: Sequence[Event], window: Window | None) -> None:
    losses = {event.phase: event.loss for event in events if isinstance(event, Evaluated)}
    reason = "no held-out rows were evaluated (measure.eval_rows=0, or the trial stopped before)"
    summary.add("loss/eval_before", losses.get(Phase.evaluation_before.value), reason)
    summary.add("loss/eval", losses.get(Phase.evaluation_after.value), reason)
    steps = window.steps if window else tuple(event for event in events if isinstance(event, Step))
    trained = sum(step.trained for step in steps)
    mean = sum(step.loss * step.trained for step in steps) / trained if trained else None
    summary.add("loss/train", mean, "no training step was finished")
