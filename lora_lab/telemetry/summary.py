"""All summary figures of a trial: a pure function of what the worker said and the card showed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_lab.events import Evaluated, Event, Phase, PhaseMemory, Step, Warned
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


def summarise(events: Sequence[Event], samples: Sequence[Sample], no_sensor: str) -> Summary:
    """
    Figures of one trial.

    Args:
        events: everything the worker said, in order.
        samples: what the card showed meanwhile; empty without a sensor.
        no_sensor: why there are no samples, for the figures that need them.
    """
    summary = Summary(warnings=[event.text for event in events if isinstance(event, Warned)])
    window = find_window(events)
    _add_throughput(summary, window)
    _add_vram(summary, events, samples, no_sensor)
    _add_energy(summary, window, samples, no_sensor)
    _add_losses(summary, events, window)
    return summary


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
    skipped = sum(step.skipped for step in window.steps)
    if skipped:
        summary.metrics["window/steps_skipped"] = float(skipped)
        summary.warnings.append(
            f"{skipped} of {len(window.steps)} measured steps overflowed fp16 and changed no weight"
        )


def _add_vram(summary: Summary, events: Sequence[Event], samples: Sequence[Sample], no_sensor: str) -> None:
    training = [
        e for e in events if isinstance(e, PhaseMemory) and e.phase in (Phase.warm_up.value, Phase.window.value)
    ]
    no_allocator = "torch's allocator reports on GPUs only" if no_sensor else "no training step was reached"
    allocated = max((m.peak_allocated_bytes / GIB for m in training), default=None)
    reserved = max((m.peak_reserved_bytes / GIB for m in training), default=None)
    summary.add("vram/peak_allocated_gib", allocated, no_allocator)
    summary.add("vram/peak_reserved_gib", reserved, no_allocator)
    used = max((s.used_bytes / GIB for s in samples if s.used_bytes is not None), default=None)
    summary.add("vram/peak_device_gib", used, no_sensor or "the card does not report its used memory")


def _add_energy(summary: Summary, window: Window | None, samples: Sequence[Sample], no_sensor: str) -> None:
    if window is None or not samples:
        reason = no_sensor or ("the measured window was not completed" if window is None else "no sensor was read")
        summary.absent["energy/joules_per_token"] = reason
        return
    energy = window_energy(window, samples)
    summary.energy_source = energy.source
    if energy.joules is None:
        summary.absent["energy/joules_per_token"] = energy.reason
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
