"""Compare what lora_lab.fit had said of a trial's memory with what was measured."""

from collections.abc import Sequence

from lora_lab.events import Event, PhaseMemory, Step
from lora_lab.phase import FIRST_STEP, Phase
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.host_facts import HostFacts, MemoryEstimate

_SIZES = ("allocated", "reserved", "card", "low", "enough", "high")
_MEASURED = {
    "allocated": "vram/peak_allocated_gib",
    "reserved": "vram/peak_reserved_gib",
    "card": "vram/peak_process_gib",
}
"""What each estimate is compared with."""
_PAGED = "vram/optimizer_paged_gib"
"""It is on the card, but the driver does not count it to the process."""
_STEPS = {FIRST_STEP, Phase.warm_up.value, Phase.window.value}
_BETWEEN = {Phase.evaluation.value, Phase.checkpoint.value}
"""Of a job: the phases that `vram/peak_*` are over besides its steps."""
_FULL = 0.99
"""The share of full rows' token slots from which a step counts as full."""


def add_estimate(summary: Summary, events: Sequence[Event], seen: HostFacts, has_finished: bool) -> None:
    """Add the estimate, and by which share of what was measured it was off, where both are of the same."""
    said = seen.estimate
    if said is None:
        sizes, errors = (f"estimate/{name}_gib" for name in _SIZES), (f"estimate/{name}_error" for name in _MEASURED)
        summary.without((*sizes, *errors), seen.no_estimate)
        return
    summary.metrics |= {f"estimate/{name}_gib": getattr(said, name) / GIB for name in _SIZES}
    summary.tags["estimate_verdict"] = said.verdict
    apart = _differs(said, events) if has_finished else "the trial did not finish"
    for name, key in _MEASURED.items():
        why = apart or ("" if name == "allocated" else _squeezed(events))
        measured = None if why else summary.metrics.get(key)
        if measured and name == "card":
            measured += summary.metrics.get(_PAGED, 0.0)
        error = getattr(said, name) / GIB / measured - 1 if measured else None
        summary.add(f"estimate/{name}_error", error, why or summary.absent.get(key, f"{key} was 0"))


def _differs(said: MemoryEstimate, events: Sequence[Event]) -> str:
    """Return why what was measured is of something else than the estimate; empty where it is not."""
    fullest = max((event.slots for event in events if isinstance(event, Step)), default=0)
    if fullest < _FULL * said.slots:
        return f"rows were shorter than estimated: at most {fullest:,} of {said.slots:,} token slots in a step"
    steps, between = (
        max((memory.peak_allocated_bytes for memory in _memory(events, phases)), default=0)
        for phases in (_STEPS, _BETWEEN)
    )
    if between > steps:
        return "an evaluation or a checkpoint took more memory than a step, and the estimate is of a step"
    return ""


def _squeezed(events: Sequence[Event]) -> str:
    """Return why what torch reserved is less than it is where there is enough; empty where it is not."""
    if any(memory.retries for memory in _memory(events, _STEPS | _BETWEEN)):
        return "the card was full, and torch gave back what it had kept; the estimate is for a card with enough memory"
    return ""


def _memory(events: Sequence[Event], phases: set[str]) -> list[PhaseMemory]:
    return [event for event in events if isinstance(event, PhaseMemory) and event.phase in phases]
