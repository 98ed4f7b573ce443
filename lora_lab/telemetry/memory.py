"""Report device memory by phase: what torch's allocator held, what card and process showed, and the rest."""

from collections.abc import Sequence
from dataclasses import replace

from lora_lab.events import Event, OptimizerMemory, PhaseBegan, PhaseMemory
from lora_lab.phase import FIRST_STEP, Phase
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.gpu_processes import worker_pids
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.phases import TRAINING, Span, spans, training_spans
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.window import between

_PARTS: dict[str, tuple[Phase | str, ...]] = {
    "load": (Phase.model,),
    "first_step": (FIRST_STEP,),
    "steady": (Phase.window,),
    "evaluation": (Phase.evaluation_before, Phase.evaluation, Phase.evaluation_after),
}
_PARTS_BY_NAME = {
    part: tuple(phase.value if isinstance(phase, Phase) else phase for phase in phases)
    for part, phases in _PARTS.items()
}
_SPILL_SLACK_BYTES = 256 * 2**20
"""The allocator's own count and the driver's may differ by this much although nothing was spilled."""


def add_memory(summary: Summary, events: Sequence[Event], samples: Sequence[Sample], seen: HostFacts) -> None:
    """Add peaks over training, peaks of each phase, the optimizer's state, and what remains unaccounted for."""
    told = _told(events)
    phases = spans(events)
    pids = worker_pids(events, samples, seen.parent_pid)
    _add_training(summary, events, told, samples, seen, pids)
    _add_by_card(summary, events, samples, pids)
    for part, names in _PARTS_BY_NAME.items():
        there = [told[name] for name in names if name in told]
        inside = [s for name in names for span in phases.get(name, []) for s in between(samples, *span)]
        figures = {
            "allocated": max((memory.peak_allocated_bytes for memory in there), default=None),
            "reserved": max((memory.peak_reserved_bytes for memory in there), default=None),
            "device": _peak_used(inside),
            "process": _peak_process(inside, pids),
        }
        summary.metrics |= {f"vram/{part}_{kind}_gib": b / GIB for kind, b in figures.items() if b is not None}
    _add_optimizer(summary, events, told, phases, samples, seen)
    _add_spill(summary, told, seen)


def _told(events: Sequence[Event]) -> dict[str, PhaseMemory]:
    """Return the allocator's memory by phase: the highest peaks of a phase that came again and again."""
    told: dict[str, PhaseMemory] = {}
    for event in events:
        if isinstance(event, PhaseMemory):
            before = told.get(event.phase, event)
            told[event.phase] = replace(
                event,
                peak_allocated_bytes=max(event.peak_allocated_bytes, before.peak_allocated_bytes),
                peak_reserved_bytes=max(event.peak_reserved_bytes, before.peak_reserved_bytes),
            )
    return told


def _peak_used(samples: Sequence[Sample]) -> int | None:
    return max((sample.used_bytes for sample in samples if sample.used_bytes is not None), default=None)


def _peak_process(samples: Sequence[Sample], pids: set[int]) -> int | None:
    used = [b for sample in samples for pid, b in sample.processes or () if pid in pids and b is not None]
    return max(used, default=None)


def _add_training(
    summary: Summary,
    events: Sequence[Event],
    told: dict[str, PhaseMemory],
    samples: Sequence[Sample],
    seen: HostFacts,
    pids: set[int],
) -> None:
    """Add the peaks from the first step to the end of the window, or of a whole job: what a card must have."""
    begun = {event.phase for event in events if isinstance(event, PhaseBegan)}
    training = begun & {*TRAINING}
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
    trained = training_spans(events)
    inside = [sample for span in trained for sample in between(samples, *span)]
    # a sensor that failed on the way has not seen the rest of the training
    watched = not seen.no_sensor or (bool(samples and trained) and samples[-1].t >= trained[-1][1])
    used = _peak_used(inside) if watched else None
    no_reading = seen.no_sensor or "no reading of used memory fell into training"
    summary.add("vram/peak_device_gib", None if used is None else used / GIB, no_reading)
    of_worker = _peak_process(inside, pids) if watched else None
    if used is not None and of_worker is None:
        no_reading = "the driver does not list the worker's process, or not its memory"
    summary.add("vram/peak_process_gib", None if of_worker is None else of_worker / GIB, no_reading)


def _add_by_card(summary: Summary, events: Sequence[Event], samples: Sequence[Sample], pids: set[int]) -> None:
    """Add the peaks in training of each card by itself, as tags; the metrics are the largest of them."""
    told = [event for event in events if isinstance(event, PhaseMemory) and event.phase in (*TRAINING, FIRST_STEP)]
    ranks = sorted({event.rank for event in told})
    if len(ranks) < 2:
        return
    own = [[event for event in told if event.rank == rank] for rank in ranks]
    inside = [sample for span in training_spans(events) for sample in between(samples, *span)]
    found: dict[str, Sequence[int | None]] = {
        "allocated": [max(event.peak_allocated_bytes for event in each) for each in own],
        "reserved": [max(event.peak_reserved_bytes for event in each) for each in own],
        "process": [_peak_process([s for s in inside if s.card == rank], pids) for rank in ranks],
    }
    for name, sizes in found.items():
        summary.tags[f"vram_by_card.{name}_gib"] = ", ".join("?" if b is None else f"{b / GIB:.3f}" for b in sizes)


def _add_optimizer(
    summary: Summary,
    events: Sequence[Event],
    told: dict[str, PhaseMemory],
    phases: dict[str, list[Span]],
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
    if len({sample.card for sample in samples}) > 1:
        summary.absent[name] = "with several cards it is not known which part is whose"
        return
    if window is None or state is None:
        summary.absent[name] = "the allocator's or the optimizer's share is not known"
        return
    used = _peak_used([s for span in phases[Phase.window.value] for s in between(samples, *span)])
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
