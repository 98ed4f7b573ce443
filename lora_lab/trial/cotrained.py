"""Run trials that train together: one worker, one device, and a record for each of them."""

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from lora_lab.cotrain import Member, Together
from lora_lab.events import Ended, Event, OfMember, Ready, decode
from lora_lab.fit.together import as_one
from lora_lab.outcome import End, Outcome, end_said
from lora_lab.store.heartbeat import Heartbeat
from lora_lab.store.outbox import Outbox, absolute
from lora_lab.telemetry.rapl import Rapl
from lora_lab.telemetry.sampler import Sample, Sampler
from lora_lab.telemetry.sensors import reader
from lora_lab.trial.data_parallel import placement_of
from lora_lab.trial.display import Display
from lora_lab.trial.estimated import doubt_of_job
from lora_lab.trial.inputs import check_inputs
from lora_lab.trial.session import INTERRUPTED, Request, TrialState, begin, finish_trial, measure, seen_so_far


@dataclass(slots=True)
class _Job(TrialState):
    """The job as its first member's trial, which holds the device and is shown."""

    states: list[TrialState] = field(default_factory=list)
    """Of all members, in their order."""
    ends: dict[int, End] = field(default_factory=dict)
    """How members ended that did not train to the job's end, by their numbers."""

    def on_event(self, event: Event) -> None:
        """Record an event for the member whose it is, or for all that still train, and show it."""
        if isinstance(event, OfMember):
            own = decode(event.said)
            self._note(event.member, own)
            if isinstance(own, Ended):
                self.ends[event.member] = end_said(own)
            shown = own if event.member == min(set(range(len(self.states))) - self.ends.keys(), default=0) else None
        else:
            shown = event
            if isinstance(event, Ready):
                self._share_seen()
            for number in range(len(self.states)):
                self._note(number, event)
        if shown is not None:
            self.display.show(shown)

    def _note(self, number: int, event: Event) -> None:
        if number not in self.ends:
            self.states[number].folder.note_event(event)

    def _share_seen(self) -> None:
        """Keep for every member what was seen of the device before the worker began."""
        for state in self.states:
            state.seen = copy.deepcopy(self.seen)
            state.folder.note_seen(state.seen)

    def note_sample(self, sample: Sample) -> None:
        """Keep a sample for every member that still trains."""
        for number, state in enumerate(self.states):
            if number not in self.ends:
                state.folder.note_sample(sample)


def run_together(requests: Sequence[Request]) -> list[Outcome]:
    """Run trials of a sweep together, and record each.

    Raises: InvalidInput before a worker starts; KeyboardInterrupt on Ctrl-C, after the worker was ended and all
    measurements so far were recorded."""
    asked_t, first = time.monotonic(), requests[0]
    check_inputs(first.config)
    placement = placement_of(first.config)
    together = Together(members=len(requests), job=first.folder.name)
    store = Outbox(absolute(first.config.tracking))
    members = [request.config for request in requests]
    whole = as_one(members)
    seen = seen_so_far(whole, placement, members)
    with ExitStack() as beats:
        states = []
        for request in requests:
            beats.enter_context(Heartbeat(request.folder))
            states.append(begin(replace(request, together=together), placement, copy.deepcopy(seen), asked_t))
        job = _job_of(states)
        if doubt := doubt_of_job(whole, seen):
            job.warn(doubt)
        return _run(job, store)


def _job_of(states: list[TrialState]) -> _Job:
    first = states[0]
    job = _Job(
        request=first.request,
        placement=first.placement,
        asked=first.asked,
        folder=first.folder,
        sampler=first.sampler,
        display=first.display,
        seen=first.seen,
        sweep=first.sweep,
        members=tuple(Member(config=each.request.config, folder=each.folder.path) for each in states),
        states=states,
    )
    job.sampler = Sampler(reader(first.placement.cards, Rapl()), job.note_sample)
    name = f"{len(states)} adapters, the first of them {first.asked.record.name}"
    job.display = Display(name, first.request.config, job.sampler, first.sweep)
    return job


def _run(job: _Job, store: Outbox) -> list[Outcome]:
    interrupted: KeyboardInterrupt | None = None
    try:
        end = measure(job)
    except KeyboardInterrupt as error:
        interrupted = error
        end = End(outcome=Outcome.killed, reason=INTERRUPTED)
    if end.outcome is Outcome.refused:
        end = End(outcome=Outcome.failed, reason=f"refused: {end.reason}")
    outcomes = []
    for number, state in enumerate(job.states):
        own = job.ends.get(number, end)
        state.sampler, state.seen = job.sampler, copy.deepcopy(job.seen)
        finish_trial(state, own, store)
        outcomes.append(own.outcome)
    if interrupted:
        raise interrupted
    return outcomes
