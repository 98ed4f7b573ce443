"""Where a trial's time went."""

from collections.abc import Sequence

from lora_lab.events import Ended, Event, Phase, PhaseBegan

_WORK = (Phase.conversion, Phase.model, Phase.evaluation_before)
"""What a trial needs before its first step, whoever runs it; the rest before that step is overhead."""


def durations(events: Sequence[Event], asked_t: float) -> dict[str, float]:
    """Seconds of each phase that is over, and how long the first step took to come.

    Args:
        asked_t: time.monotonic() seconds when the trial was asked for.
    """
    begun = [(event.phase, event.t) for event in events if isinstance(event, PhaseBegan)]
    ends = [t for _, t in begun[1:]] + [event.t for event in events if isinstance(event, Ended)]
    found = {f"time/{phase}_seconds": end - t for (phase, t), end in zip(begun, ends, strict=False)}
    first = dict(begun).get(Phase.warm_up.value)
    if first is not None:
        work = sum(found.get(f"time/{phase.value}_seconds", 0.0) for phase in _WORK)
        found["time/asked_to_first_step_seconds"] = first - asked_t
        found["overhead/before_first_step_seconds"] = first - asked_t - work
    return found
