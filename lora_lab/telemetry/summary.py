"""Calculate all figures of a trial: a pure function of its events, samples and host facts."""

from collections.abc import Mapping, Sequence

from lora_lab.events import Ended, Evaluated, Event, MatmulRate, ModelCounted, PhaseMemory, Ran, Step, Warned
from lora_lab.outcome import Outcome
from lora_lab.phase import Phase
from lora_lab.telemetry.attempts import counting, split
from lora_lab.telemetry.durations import durations
from lora_lab.telemetry.efficientllm import add_efficientllm
from lora_lab.telemetry.energy_figures import add_energy
from lora_lab.telemetry.engine import add_engine
from lora_lab.telemetry.estimated import add_estimate
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.flops import flops, repeated_share
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.job import add_job
from lora_lab.telemetry.members import share_energy
from lora_lab.telemetry.memory import add_memory
from lora_lab.telemetry.quality import add_quality
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.throughput import add_busy_share, add_kernel_time, throughput
from lora_lab.telemetry.validity import add_validity
from lora_lab.telemetry.window import Window, find_window, steady


def summarise(events: Sequence[Event], samples: Sequence[Sample], seen: HostFacts, asked_t: float) -> Summary:
    """Return the figures of one trial.

    Args:
        events: all events of the worker, in order; of a job, those of its attempts one after the other.
        samples: all samples of the sensors; empty without sensors.
        asked_t: time.monotonic() seconds when the trial was asked for.
    """
    said = dict.fromkeys(event.text for event in events if isinstance(event, Warned))  # each attempt says them again
    summary = Summary(warnings=[*said])
    whole = find_window(events)
    window = None if whole is None else steady(whole)
    _add_throughput(summary, window)
    if whole is not None and window is not None:
        _add_left_out(summary, whole, window)
    add_busy_share(summary, window, events)
    add_kernel_time(summary, window, events)
    add_engine(summary, events)
    _add_flops(summary, window, events)
    add_memory(summary, events, samples, seen)
    ended = _ended(events)
    add_estimate(summary, events, seen, has_finished=ended is not None and ended.outcome == Outcome.finished.value)
    add_energy(summary, window, samples, seen)
    share_energy(summary, seen.members)
    if window is not None:
        add_efficientllm(summary, window, events, samples, seen)
    add_validity(summary, events, window, samples, seen)
    add_job(summary, events, samples, seen)
    _add_losses(summary, events, whole)
    add_quality(summary, events)
    summary.metrics |= durations(events, asked_t, seen.metrics.get("time/waiting_seconds", 0.0))
    _add_limits(summary, events, ended, samples)
    summary.warnings += seen.warnings
    summary.metrics |= seen.metrics
    return summary


def _add_left_out(summary: Summary, whole: Window, window: Window) -> None:
    left_out = len(whole.steps) - len(window.steps)
    if not left_out:
        return
    summary.metrics["window/steps_left_out"] = float(left_out)
    summary.warnings.append(
        f"the first {left_out} of {len(whole.steps)} measured steps were slow (a compilation, or too short a warm-up) "
        "and are left out; a longer measure.warmup_steps would keep them out of the window"
    )


def _add_flops(summary: Summary, window: Window | None, events: Sequence[Event]) -> None:
    ran = next((event.facts for event in events if isinstance(event, Ran)), {})
    counted = next((event for event in events if isinstance(event, ModelCounted)), None)
    layers = None if counted is None else counted.layers
    metrics, absent = flops(
        counted,
        window,
        _repeated(ran, layers),
        ran.get("attention_kernel", "not seen"),
        next((event for event in events if isinstance(event, MatmulRate)), None),
        devices=int(ran.get("world_size", "1")),
    )
    summary.metrics |= metrics
    summary.absent |= absent


def _repeated(ran: Mapping[str, str], layers: int | None) -> float | None:
    """Return the share of the layers that are calculated twice; None where it is not known: with an MLP in tiles, which
    is calculated twice without checkpointing, and three times where a norm lies behind it."""
    is_tiled = ran.get("mlp_tile", "None") != "None"
    return None if is_tiled else repeated_share(ran.get("gradient_checkpointing", "none"), layers)


def _ended(events: Sequence[Event]) -> Ended | None:
    """Return how the last attempt ended; None where its worker could not say. Of several workers that one is asked who
    did not finish, and otherwise the lead."""
    said = [event for event in split(events)[-1] if isinstance(event, Ended)] if events else []
    return min(said, key=lambda event: (event.outcome == Outcome.finished.value, event.rank), default=None)


def _add_limits(summary: Summary, events: Sequence[Event], ended: Ended | None, samples: Sequence[Sample]) -> None:
    """Add the peak of the whole trial, not of training alone, and for an out-of-memory error the last request."""
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


def _add_losses(summary: Summary, events: Sequence[Event], window: Window | None) -> None:
    told = [event for event in events if isinstance(event, Evaluated)]
    before = next((event.loss for event in told if event.phase == Phase.evaluation_before.value), None)
    after = next((event.loss for event in reversed(told) if event.phase == Phase.evaluation_after.value), None)
    reason = "no held-out rows were evaluated (measure.eval_rows=0, or the trial stopped before)"
    summary.add("loss/eval_before", before, reason)
    summary.add("loss/eval", after, reason)
    steps = window.steps if window else tuple(event for event in counting(events) if isinstance(event, Step))
    trained = sum(step.trained for step in steps)
    mean = sum(step.loss * step.trained for step in steps) / trained if trained else None
    summary.add("loss/train", mean, "no training step was finished")
