"""Calculate speed: ratios of sums over the window, never means of ratios."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from lora_lab.events import Event, Profiled, Step
from lora_lab.job_events import JobPlanned
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.window import Window

HOST_BOUND, GPU_BOUND = 0.75, 0.9
"""Below the first share of busy time the GPU waits for the host; above the second it does not."""

_BATCHES = 10
"""Number of batches of consecutive steps for the interval. Neighbouring steps are alike, batches much less so."""


def throughput(window: Window) -> dict[str, float]:
    """Return rates over the window by metric name. Tokens are real ones: padding is not counted.

    seconds_per_10k_tokens is the unit of arXiv 2509.12229: 10,000 / (tokens per second).
    """
    real = sum(step.real for step in window.steps)
    slots = sum(step.slots for step in window.steps)
    trained = sum(step.trained for step in window.steps)
    figures = {
        "throughput/tokens_per_second": real / window.seconds,
        "throughput/slots_per_second": slots / window.seconds,
        "throughput/trained_tokens_per_second": trained / window.seconds,
        "throughput/samples_per_second": sum(step.rows for step in window.steps) / window.seconds,
        "throughput/steps_per_second": len(window.steps) / window.seconds,
        "throughput/seconds_per_10k_tokens": 1e4 * window.seconds / real,
        "throughput/data_wait_share": sum(step.waited_seconds for step in window.steps) / window.seconds,
        "window/seconds": window.seconds,
        "window/steps": float(len(window.steps)),
        "tokens/real_share": real / slots,
        "tokens/trained_share": trained / slots,
    }
    timed = [step.seconds for step in window.steps if step.seconds is not None]
    if timed:
        figures["throughput/step_seconds_p50"] = statistics.median(timed)
    if len(timed) >= 2:
        figures["throughput/step_seconds_p95"] = statistics.quantiles(timed, n=20, method="inclusive")[-1]
    error = rate_error(window.steps)
    if error is not None:
        figures["throughput/tokens_per_second_error"] = error
    return figures


def rate_error(steps: Sequence[Step]) -> float | None:
    """Return half the 95 % interval of real tokens per second, from the variation of this window's own steps.

    Batch means of a ratio estimator (Law, Simulation Modeling and Analysis, 9.5; Cochran, Sampling Techniques, 6):
    consecutive steps in batches, the batches' residuals x - R t around the common rate R, Student's t over them. It
    does not cover differences between trials. None with fewer than 20 steps, or a step without a time.
    """
    from scipy.special import stdtrit  # a third of a second to import, needed once at a trial's end

    if len(steps) < 2 * _BATCHES:
        return None
    edges = [round(i * len(steps) / _BATCHES) for i in range(_BATCHES + 1)]
    batches = [steps[a:b] for a, b in pairwise(edges)]
    tokens = [sum(step.real for step in batch) for batch in batches]
    if any(step.seconds is None for step in steps):
        return None
    seconds = [sum(step.seconds or 0.0 for step in batch) for batch in batches]
    rate = sum(tokens) / sum(seconds)
    residuals = sum((x - rate * t) ** 2 for x, t in zip(tokens, seconds, strict=True))
    deviation = math.sqrt(_BATCHES / (_BATCHES - 1) * residuals) / sum(seconds)
    return float(stdtrit(_BATCHES - 1, 0.975)) * deviation


def add_busy_share(summary: Summary, window: Window | None, events: Sequence[Event]) -> None:
    """Add the share of the window in which the GPU worked, and the regime that follows from it.

    The profiled steps' busy time for each slot, over the window's time for each slot: the profiler slows the host down,
    never a kernel.
    """
    name = "throughput/gpu_busy_share"
    profiled, why = _profiled(window, events)
    if window is None or profiled is None:
        summary.absent[name] = why
        return
    slots = sum(step.slots for step in window.steps)
    share = (profiled.busy_seconds / profiled.slots) / (window.seconds / slots)
    summary.metrics |= {
        name: share,
        "throughput/gpu_busy_seconds_per_step": profiled.busy_seconds / profiled.steps,
        "throughput/kernels_per_step": profiled.kernels / profiled.steps,
    }
    summary.tags["regime"] = regime_at(share)


def regime_at(busy_share: float) -> str:
    """Return the regime in which the GPU works this share of the time."""
    return "host-bound" if busy_share < HOST_BOUND else "GPU-bound" if busy_share > GPU_BOUND else "mixed"


def add_kernel_time(summary: Summary, window: Window | None, events: Sequence[Event]) -> None:
    """Add the summed time of a step's kernels and copies, and the window's step time as a multiple of it.

    By slots, as for the busy share: the window's median step over its mean slots, over the profiled kernels' time for
    each slot. Kernels that overlap count each for itself, so the busy time can be shorter than their sum.
    """
    names = ("throughput/kernel_seconds", "throughput/step_to_kernel_ratio")
    profiled, why = _profiled(window, events)
    if window is None or profiled is None:
        summary.without(names, why)
        return
    if profiled.kernel_seconds is None:
        summary.without(names, "the profile does not say how long its kernels took")
        return
    summary.metrics[names[0]] = profiled.kernel_seconds / profiled.steps
    timed = [step.seconds for step in window.steps if step.seconds is not None]
    slots = sum(step.slots for step in window.steps) / len(window.steps)
    a_slot = profiled.kernel_seconds / profiled.slots
    ratio = statistics.median(timed) / slots / a_slot if timed else None
    summary.add(names[1], ratio, "the window's steps have no times")


def _profiled(window: Window | None, events: Sequence[Event]) -> tuple[Profiled | None, str]:
    """Return the profile to compare with the window; without one, the reason."""
    if window is None:
        return None, "the measured window was not completed"
    profiled = next((event for event in events if isinstance(event, Profiled)), None)
    if profiled is None and any(isinstance(event, JobPlanned) for event in events):
        return None, "the steps of a job are not profiled"
    if profiled is None:
        return None, "no step was profiled: that takes a GPU, measure.profile_steps, and a trial that gets so far"
    if not profiled.kernels:
        return None, "the profiler saw no kernel: this process may not use the card's performance counters"
    return profiled, ""
