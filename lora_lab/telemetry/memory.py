"""Report device memory by phase: what torch's allocator held, what card and process showed, and the rest."""

import math
from collections.abc import Sequence

from lora_lab.events import FIRST_STEP, Event, OptimizerMemory, Phase, PhaseBegan, PhaseMemory
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.gpu_processes import worker_pid
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.phases import Span, spans
from lora_lab.telemetry.sampler import Sample

_PARTS = {
    "load": (Phase.model,),
    "first_step": (FIRST_STEP,),
    "steady": (Phase.window,),
    "evaluation": (Phase.evaluation_before, Phase.evaluation_after),
}
_PARTS_BY_NAME = {
    part: tuple(phase.value if isinstance(phase, Phase) else phase for phase in phases)
    for part, phases in _PARTS.items()
}
_SPILL_SLACK_BYTES = 256 * 2**20
"""The allocator's own count and the driver's may differ by this much although nothing was spilled."""


def add_memory(summary: Summary, events: Sequence[Event], samples: Sequence[Sample], seen: HostFacts) -> None:
    """Add peaks over training, peaks of each phase, the optimizer's state, and what remains unaccounted for."""
    told = {event.phase: event for event in events if isinstance(event, PhaseMemory)}
    phases = spans(events)
    pid = worker_pid(events, samples, seen.parent_pid)
    _add_training(summary, events, told, samples, seen, pid)
    for part, names in _PARTS_BY_NAME.items():
        there = [told[name] for name in names if name in told]
        inside = [s for name in names if name in phases for s in _within(samples, phases[name])]
        figures = {
            "allocated": max((memory.peak_allocated_bytes for memory in there), default=None),
            "reserved": max((memory.peak_reserved_bytes for memory in there), default=None),
            "device": _peak_used(inside),
            "process": _peak_process(inside, pid),
        }
        summary.metrics |= {f"vram/{part}_{kind}_gib": b / GIB for kind, b in figures.items() if b is not None}
    _add_optimizer(summary, events, told, phases, samples, seen)
    _add_spill(summary, told, seen)


def _within(samples: Sequence[Sample], span: Span) -> list[Sample]:
    return [sample for sample in samples if span[0] <= sample.t <= span[1]]


def _peak_used(samples: Sequence[Sample]) -> int | None:
    return max((sample.used_bytes for sample in samples if sample.used_bytes is not None), default=None)


def _peak_process(samples: Sequence[Sample], pid: int | None) -> int | None:
    used = [dict(sample.processes).get(pid) for sample in samples if sample.processes] if pid is not None else []
    return max((b for b in used if b is not None), default=None)


def _add_training(
    summary: Summary,
    events: Sequence[Event],
    told: dict[str, PhaseMemory],
    samples: Sequence[Sample],
    seen: HostFacts,
    pid: int | None,
) -> None:
    """Add the peaks from the first step to the end of the window: what a card must have."""
    begun = {event.phase for event in events if isinstance(event, PhaseBegan)}
    training = begun & {Phase.warm_up.value, Phase.window.value}
    if seen.card_bytes is None and not told:
        why = "torch's allocator reports on GPUs only"
    elif training <= told.keys():
        why = "no training step was reached"
    else:
        why = "the worker was gone before it could report the allocator's peak"
    whole = [told[phase] for phase in training] if training <= told.keys() else []
    whole += [told[FIRST_STEP]] if whole and FIRST_STEP in told else []
    allocated = max((memory.peak_allocated_bytes / GIB for memory in whole), default=None)
    reserved = max((memory.peak_reserved_bytes / GIB for memory in whole), default=None)
    summary.add("vram/peak_allocated_gib", allocated, why)
    summary.add("vram/peak_reserved_gib", reserved, why)
    span = _training_span(events)
    inside = _within(samples, span)
    # a sensor that failed on the way has not seen the rest of the training
    watched = not seen.no_sensor or (bool(samples) and samples[-1].t >= span[1])
    used = _peak_used(inside) if watched else None
    no_reading = seen.no_sensor or "no reading of used memory fell into training"
    summary.add("vram/peak_device_gib", None if used is None else used / GIB, no_reading)
    of_worker = _peak_process(inside, pid) if watched else None
    if used is not None and of_worker is None:
        no_reading = "the driver does not list the worker's process, or not its memory"
    summary.add("vram/peak_process_gib", None if of_worker is None else of_worker / GIB, no_reading)


def _training_span(events: Sequence[Event]) -> Span:
    """Return when training began and ended, in seconds; loading, profiling and evaluation lie outside."""
    begins = {event.phase: event.t for event in events if isinstance(event, PhaseBegan)}
    start = begins.get(Phase.warm_up.value, math.inf)
    after = [t for t in begins.values() if t > begins.get(Phase.window.value, start)]
    return start, min(after, default=math.inf)


def _add_optimizer(
    summary: Summary,
    events: Sequence[Event],
    told: dict[str, PhaseMemory],
    phases: dict[str, Span],
    samples: Sequence[Sample],
    seen: HostFacts,
) -> None:
    state = next((event for event in events if isinstance(event, OptimizerMemory)), None)
    if state is not None:
        summary.metrics |= {
            "vram/optimizer_gib": state.total_bytes / GIB,
            "vram/optimizer_eligible_gib": state.eligible_bytes / GIB,
            "vram/optimizer_paged_gib": state.paged_bytes / GIB,
            "vram/optimizer_paged_tensors": float(state.paged_tensors),
        }
        if state.is_paged and not state.paged_tensors:
            summary.warnings.append(
                "the paged optimizer pages nothing: bitsandbytes pages the state of parameters with at least 100,000 "
                "elements only, and none has that many; it behaves as the same optimizer unpaged"
            )
    window, name = told.get(Phase.window.value), "vram/other_gib"
    if window is None or state is None:
        summary.absent[name] = "the allocator's or the optimizer's share is not known"
        return
    used = _peak_used(_within(samples, phases[Phase.window.value]))
    if used is None or seen.used_before_bytes is None:
        summary.absent[name] = seen.no_sensor or "the card's memory was not read before the trial and in the window"
        return
    # at a steady step all three stand still; the context, libraries' kernels and workspaces are what is left
    rest = used - seen.used_before_bytes - window.peak_reserved_bytes - state.paged_bytes
    summary.metrics[name] = rest / GIB


def _add_spill(summary: Summary, told: dict[str, PhaseMemory], seen: HostFacts) -> None:
    """Warn where the driver (WSL2) used main memory because the card was full: training goes on, many times slower."""
    spilled = 0
    for memory in told.values():
        if memory.reserved_bytes is not None and memory.device_used_bytes is not None:
            spilled = max(spilled, memory.reserved_bytes - memory.device_used_bytes)
        if seen.card_bytes is not None:
            spilled = max(spilled, memory.peak_reserved_bytes - seen.card_bytes)
    if spilled > _SPILL_SLACK_BYTES:
        summary.metrics["vram/spilled_gib"] = spilled / GIB
