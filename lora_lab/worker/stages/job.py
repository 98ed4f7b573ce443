"""Run a job: from its start or its newest checkpoint to its end, and back to a checkpoint after a spike."""

import time
from itertools import islice
from pathlib import Path

import torch
from accelerate.data_loader import SeedableRandomSampler

from lora_lab.config import TrialConfig
from lora_lab.job_events import JobPlanned, Resumed, Spiked
from lora_lab.options import OnSpike
from lora_lab.outcome import Diverged
from lora_lab.phase import Phase
from lora_lab.worker.checkpoints import Checkpoint, Checkpoints
from lora_lab.worker.engines.engine import Engine
from lora_lab.worker.job_callback import JobTelemetry
from lora_lab.worker.job_plan import JobPlan
from lora_lab.worker.job_trainer import JobTrainer
from lora_lab.worker.stages.stage import TrialContext
from lora_lab.worker.trainables import trainable_of

_MOST_RETURNS = 3
"""Spikes after which a job goes back; it stops at the next."""

_LOWER = 0.5
"""The share of the learning rate that is left after a spike."""


class Job:
    """One job in this process."""

    def __init__(
        self, trial: TrialContext, plan: JobPlan, telemetry: JobTelemetry, engine: Engine, checkpoints: Checkpoints
    ) -> None:
        self._trial = trial
        self._plan = plan
        self._telemetry = telemetry
        self._engine = engine
        self._checkpoints = checkpoints
        self._trainer: JobTrainer = trial.trainer
        self._from_lead = trial.group.from_lead
        telemetry.on_begin = self._save_start

    def run(self) -> None:
        """Train to the end, and leave the model as it is to be saved.

        Raises: Diverged for a spike after which the job stops."""
        self._from_lead(self._checkpoints.remove_torn)
        checkpoint = self._first_checkpoint()
        plan = self._plan
        self._trial.emit(JobPlanned(t=time.monotonic(), steps=plan.steps, steps_per_epoch=plan.steps_per_epoch))
        while True:
            try:
                self._train_from(checkpoint)
                break
            except Diverged as spike:
                checkpoint = self._after(spike)
        if self._trial.config.train.keep_best and self._from_lead(self._checkpoints.best.is_dir):
            self._load(self._checkpoints.best)

    def _save_start(self) -> None:
        """Save a checkpoint of the start where a spike may go back to it."""
        if self._trial.config.train.on_spike is OnSpike.lower_lr and not self._checkpoints.all():
            self._trainer.save_start()

    def _first_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint to go on from; None to start from the beginning."""
        if not (self._trial.config.resume and self._checkpoints.are_of_earlier):
            return None
        found = self._checkpoints.newest()
        if found is None:
            self._trial.warn("no complete checkpoint was found: the job starts from the beginning")
        else:
            self._trainer.rate_share = found.facts["rate_share"]
        self._say_resumed(found)
        return found

    def _say_resumed(self, checkpoint: Checkpoint | None) -> None:
        folder = "" if checkpoint is None else str(checkpoint.folder.relative_to(self._trial.folder))
        step = 0 if checkpoint is None else checkpoint.step
        self._trial.emit(Resumed(t=time.monotonic(), step=step, folder=folder))

    def _train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train from a checkpoint, or from the start."""
        self._from_lead(lambda: self._checkpoints.restore_best(checkpoint))
        if checkpoint is None:
            self._trainer.train()
        else:
            self._trial.clock.enter(Phase.checkpoint)
            self._telemetry.restore_watch(checkpoint.facts["watch"])
            self._telemetry.rate_factor = self._trainer.rate_share / checkpoint.facts["rate_share"]
            if checkpoint.facts["is_end"]:
                self._load(checkpoint.folder)
                return
            self._trainer.train(resume_from_checkpoint=str(checkpoint.folder))

    def _load(self, folder: Path) -> None:
        """Copy what was trained from disk into the model."""
        trainable_of(self._trial.config).load(self._trial.model, folder)

    def _after(self, spike: Diverged) -> Checkpoint:
        """Return the checkpoint to go back to.

        Raises: Diverged, when the job stops."""
        self._telemetry.abandon()
        checkpoint, why_not = self._to_go_back_to(spike)
        rate = None
        if checkpoint is not None:
            self._trainer.rate_share *= _LOWER
            rate = self._trial.config.learning_rate * self._trainer.rate_share
        self._trial.emit(
            Spiked(
                t=time.monotonic(),
                step=spike.step,
                reason=str(spike),
                action=(OnSpike.stop if checkpoint is None else OnSpike.lower_lr).value,
                learning_rate=rate,
                rows=rows_of_step(self._trial.config, len(self._trial.examples.train), self._plan, spike.step),
            )
        )
        if checkpoint is None:
            raise Diverged(f"{spike}{why_not}", spike.step) from spike
        self._say_resumed(checkpoint)
        self._trainer.forget_training()
        self._engine.release()
        return checkpoint

    def _to_go_back_to(self, spike: Diverged) -> tuple[Checkpoint | None, str]:
        """Return the checkpoint before a spike, or None and why the job stops instead."""
        if self._trial.config.train.on_spike is OnSpike.stop:
            return None, ""
        if self._trainer.rate_share <= _LOWER**_MOST_RETURNS:  # each return lowered it, also before a resume
            return None, f"; the job went back {_MOST_RETURNS} times before, which is the most it does"
        found = self._from_lead(lambda: self._checkpoints.go_back_before(spike.step))
        return found, "; no checkpoint from before it is left to go back to"


def rows_of_step(config: TrialConfig, rows: int, plan: JobPlan, step: int) -> list[int]:
    """Return the training rows of a step, both counted: rows from 0, steps from 1. The order is drawn again by the
    sampler that Trainer's loader has."""
    epoch, place = divmod(step - 1, plan.steps_per_epoch)
    sampler = SeedableRandomSampler(range(rows), generator=torch.Generator(), data_seed=config.seed)
    sampler.set_epoch(epoch)
    per_step = config.rows_per_step
    whole = rows - plan.rows_left_out
    return list(islice(sampler, place * per_step, min((place + 1) * per_step, whole)))
