"""What a stage is, and what the stages of one trial share."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_lab.config import TrialConfig
from lora_lab.cotrain import Member
from lora_lab.events import Event, OfMember, Warned, encode
from lora_lab.phase import Phase
from lora_lab.worker.examples import Examples
from lora_lab.worker.group import Group
from lora_lab.worker.job_plan import JobPlan
from lora_lab.worker.members import Members
from lora_lab.worker.phases import Emit, PhaseClock


@dataclass(slots=True, kw_only=True)
class TrialContext:
    """One trial while it runs. Some fields have no value until the stage that their docstring names has run."""

    config: TrialConfig
    folder: Path
    emit: Emit
    clock: PhaseClock
    group: Group = field(default_factory=Group)
    """The workers that share the trial."""
    members: tuple[Member, ...] = ()
    """The trials that train together here; empty for a trial alone."""
    together: Members | None = None
    """Their adapters; set by `model_loading`."""
    device: torch.device = field(init=False)
    """Set by `preparation`."""
    architecture: Any = field(init=False)
    """The transformers config; set by `data_loading`."""
    examples: Examples = field(init=False)
    """Set by `data_loading`."""
    plan: JobPlan | None = None
    """Of a job; set by `data_loading`."""
    rows_digest: str = field(init=False)
    """The sha256 of all rows as tokens, before any is screened; set by `data_loading`."""
    padding: int = field(init=False)
    """The token that rows are padded with; set by `data_loading`."""
    model: Any = field(init=False)
    """Set by `model_loading`."""
    trainer: Any = field(init=False)
    """Set by `trainer_setup`."""
    train: Callable[[], None] = field(init=False)
    """Takes all steps; set by `trainer_setup`."""

    def warn(self, text: str) -> None:
        """Send a warning for the user and the record. The workers of a group find the same, and the lead says it."""
        if self.group.is_lead:
            self.emit(Warned(t=time.monotonic(), text=text))

    def emit_of(self, number: int) -> Emit:
        """Return what sends the events of one of the members."""

        def emit(event: Event) -> None:
            self.emit(OfMember(t=event.t, member=number, said=encode(event)))

        return emit

    @contextmanager
    def only(self, number: int) -> Iterator["TrialContext"]:
        """Return the trial as one of the members alone: within, the model has its adapter alone."""
        member = self.members[number]
        own = copy.copy(self)
        own.config, own.folder, own.emit, own.members = member.config, member.folder, self.emit_of(number), ()
        assert self.together is not None
        with self.together.only(number):
            yield own


def always(_: TrialContext) -> bool:
    """Return True: most stages are part of every trial."""
    return True


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a trial."""

    phase: Phase | None
    """Entered before `run`. None for a stage that enters its phases itself, or belongs to the one before it."""
    run: Callable[[TrialContext], None]
    is_needed: Callable[[TrialContext], bool] = always
    """Return False where the trial leaves the stage out, with its phase."""
    lead_only: bool = False
    """Whether, of the workers that share a trial, the lead alone runs it."""
    each_member: bool = False
    """Whether, of trials that train together, it is run for each by itself."""

    def run_for_all(self, trial: TrialContext) -> None:
        """Run it, for each member by itself where that is meant. One that has diverged is left out."""
        if not (self.each_member and trial.members):
            self.run(trial)
            return
        for number in range(len(trial.members)):
            if trial.together is not None and number not in trial.together.diverged:
                with trial.only(number) as own:
                    self.run(own)
