"""Join the attempts at one job: their events and samples on one clock, and what of them counts.

Every attempt has a worker of its own. The monotonic clock of another boot or host is another clock, so an earlier
attempt's times are moved by the difference of their clocks to Unix time.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from lora_lab.events import Evaluated, Event, PhaseBegan, Ready, Step, WindowClosed, WindowOpened
from lora_lab.job_events import Checkpointed, JobPlanned, Resumed
from lora_lab.phase import Phase
from lora_lab.telemetry.sampler import Sample


def moved(events: Sequence[Event], seconds: float) -> list[Event]:
    """Return the events, each `seconds` later."""
    return [replace(event, t=event.t + seconds) for event in events]


def moved_samples(samples: Sequence[Sample], seconds: float) -> list[Sample]:
    """Return the samples, each `seconds` later."""
    return [replace(sample, t=sample.t + seconds) for sample in samples]


def split(events: Sequence[Event]) -> list[list[Event]]:
    """Return the events of each attempt. A worker's first events are Ready and the beginning of the phase `start`;
    with isolation=inline there is no Ready."""
    found: list[list[Event]] = []
    begun = has_lead = False
    """Whether the present attempt has entered a phase, and whether its lead was heard: of several workers any may be
    ready first."""
    for event in events:
        starts = isinstance(event, PhaseBegan) and event.phase == Phase.start.value and begun
        is_lead = isinstance(event, Ready) and event.rank == 0
        if not found or starts or (is_lead and (has_lead or begun)):
            found.append([])
            begun = has_lead = False
        begun = begun or isinstance(event, PhaseBegan)
        has_lead = has_lead or is_lead
        found[-1].append(event)
    return found


def with_samples(events: Sequence[Event], samples: Sequence[Sample]) -> list[tuple[list[Event], Sequence[Sample]]]:
    """Return the events of each attempt with the samples up to the next one; one attempt without events has all."""
    attempts = split(events) or [[]]
    begins = [attempt[0].t for attempt in attempts[1:]]
    edges = [0, *(bisect_left(samples, t, key=lambda sample: sample.t) for t in begins), len(samples)]
    return [(attempt, samples[a:b]) for attempt, (a, b) in zip(attempts, pairwise(edges), strict=True)]


def counting(events: Sequence[Event]) -> list[Event]:
    """Return the events without steps, windows, evaluations and checkpoints that a later Resumed takes back. An attempt
    that plans its job without one takes back everything: it begins with the first step."""
    kept: list[Event] = []
    for attempt in split(events):
        resumed = False
        for event in attempt:
            if isinstance(event, Resumed) or (isinstance(event, JobPlanned) and not resumed):
                step = event.step if isinstance(event, Resumed) else 0
                kept = [earlier for earlier in kept if not _is_after(earlier, step)]
                resumed = True
            kept.append(event)
    return kept


def _is_after(event: Event, step: int) -> bool:
    if isinstance(event, WindowOpened):
        return event.after_step >= step
    if isinstance(event, WindowClosed):
        return event.after_step > step
    if isinstance(event, Evaluated):
        return event.step is not None and event.step > step
    return isinstance(event, Step | Checkpointed) and event.step > step
