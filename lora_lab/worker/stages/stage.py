"""What a stage is, and what the stages of one trial share."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_lab.config import TrialConfig
from lora_lab.events import Warned
from lora_lab.phase import Phase
from lora_lab.worker.examples import Examples
from lora_lab.worker.group import Group
from lora_lab.worker.job_plan import JobPlan
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
