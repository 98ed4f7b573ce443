"""Find when each phase of a trial began and ended."""

import math
from collections.abc import Sequence

from lora_lab.events import FIRST_STEP, Ended, Event, Phase, PhaseBegan, PhaseMemory

Span = tuple[float, float]
"""From and to, in seconds of time.monotonic(); the second is infinite while the phase is not over."""


def spans(events: Sequence[Event]) -> dict[str, Span]:
    """Return every phase that began; also `first_step`, which lies within the warm-up."""
    begun = [(event.phase, event.t) for event in events if isinstance(event, PhaseBegan)]
    over = next((event.t for event in events if isinstance(event, Ended)), math.inf)
    ends = [*(t for _, t in begun[1:]), over]
    found = {phase: (t, end) for (phase, t), end in zip(begun, ends, strict=False)}
    first = next((event.t for event in events if isinstance(event, PhaseMemory) and event.phase == FIRST_STEP), None)
    if first is not None and Phase.warm_up.value in found:
        found[FIRST_STEP] = (found[Phase.warm_up.value][0], first)
    return found
