"""Account for a trial's time."""

import math
from collections.abc import Sequence

from lora_lab.events import Event
from lora_lab.phase import FIRST_STEP, Phase
from lora_lab.telemetry.phases import spans

_WORK = (
    Phase.matmul_rate,
    Phase.conversion,
    Phase.model,
    Phase.screening,
    Phase.evaluation_before,
    Phase.compilation,
)
"""What any trial needs before its first step, or once per machine. The rest of the time before it is overhead."""


def durations(events: Sequence[Event], asked_t: float, waiting_seconds: float = 0.0) -> dict[str, float]:
    """Return the seconds of each phase, as often as it was completed, and the time to the first step.

    Args:
        asked_t: time.monotonic() seconds when the trial was asked for.
        waiting_seconds: how long it then waited for the device and measured idle power. That is not overhead.
    """
    phases = spans(events)
    over = {
        phase: [end - t for t, end in each if end < math.inf] for phase, each in phases.items() if phase != FIRST_STEP
    }
    found = {f"time/{phase}_seconds": sum(seconds) for phase, seconds in over.items() if seconds}
    if Phase.warm_up.value in phases:
        first, _ = phases[Phase.warm_up.value][0]
        before = [span for phase in _WORK for span in phases.get(phase.value, []) if span[0] < first]
        work = sum(end - t for t, end in before if end < math.inf)
        found["time/asked_to_first_step_seconds"] = first - asked_t
        found["overhead/before_first_step_seconds"] = first - asked_t - waiting_seconds - work
    return found
