"""Find when each phase of a trial began and ended."""

import math
from collections.abc import Sequence

from lora_lab.events import Ended, Event, PhaseBegan, PhaseMemory
from lora_lab.phase import FIRST_STEP, Phase
from lora_lab.telemetry.attempts import split

Span = tuple[float, float]
"""From and to, in seconds of time.monotonic(); the second is infinite while the phase is not over."""

TRAINING = tuple(phase.value for phase in (Phase.warm_up, Phase.window, Phase.evaluation, Phase.checkpoint))
"""The phases from the first step to the last."""


def spans(events: Sequence[Event]) -> dict[str, list[Span]]:
    """Return every phase that began, each time that it began; also `first_step`, which lies within the warm-up.

    A phase in which an attempt was cut off has no end."""
    found: dict[str, list[Span]] = {}
    for attempt in split(events):
        begun = [(event.phase, event.t) for event in attempt if isinstance(event, PhaseBegan)]
        over = next((event.t for event in attempt if isinstance(event, Ended) and event.rank == 0), math.inf)
        ends = [*(t for _, t in begun[1:]), over]
        for (phase, t), end in zip(begun, ends, strict=False):
            found.setdefault(phase, []).append((t, end))
    first = next((event.t for event in events if isinstance(event, PhaseMemory) and event.phase == FIRST_STEP), None)
    if first is not None and Phase.warm_up.value in found:
        found[FIRST_STEP] = [(found[Phase.warm_up.value][0][0], first)]
    return found


def training_spans(events: Sequence[Event]) -> list[Span]:
    """Return from when to when each attempt trained: from its warm-up to the first phase after training. The last span
    is not over where no phase came after it."""
    found: list[Span] = []
    start: float | None = None
    for event in events:
        if not isinstance(event, PhaseBegan):
            continue
        if start is None and event.phase == Phase.warm_up.value:
            start = event.t
        elif start is not None and event.phase not in TRAINING:
            found.append((start, event.t))
            start = None
    return found if start is None else [*found, (start, math.inf)]
