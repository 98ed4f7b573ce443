"""Transformers' Trainer for a job: it evaluates by the project's held-out loss and saves complete checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl

from lora_lab.config import TrialConfig
from lora_lab.options import Schedule
from lora_lab.outcome import Diverged
from lora_lab.phase import Phase
from lora_lab.worker.checkpoints import Checkpoint, Checkpoints, is_disk_fault
from lora_lab.worker.job_callback import JobTelemetry
from lora_lab.worker.job_plan import JobPlan
from lora_lab.worker.phases import PhaseClock
from lora_lab.worker.shared_step import SharingTrainer
from lora_lab.worker.trainables import trainable_of
from lora_lab.worker.trainables.trainable import trained_parameters

_SCHEDULES = {
    Schedule.constant: "constant_with_warmup",
    Schedule.linear: "linear",
    Schedule.cosine: "cosine",
}
"""transformers' names. Its `constant` has no warm-up."""


class JobTrainer(SharingTrainer):
    """Trainer with methods of its own to evaluate, to save and to load. The loop, the schedule, early stopping and
    resuming are Trainer's. Of several workers the lead alone writes."""

    control: TrainerControl

    def __init__(
        self,
        *,
        config: TrialConfig,
        clock: PhaseClock,
        telemetry: JobTelemetry,
        checkpoints: Checkpoints,
        heldout: Callable[[int], float],
        on_saved: Callable[[Checkpoint, float], None],
        warn: Callable[[str], None],
        rows_digest: str,
        is_lead: bool,
        **arguments: Any,
    ) -> None:
        """Take what SharingTrainer takes, and:

        Args:
            heldout: evaluates after a step, and returns the held-out loss.
            on_saved: gets each complete checkpoint, and its epoch.
            rows_digest: says which rows it is trained on; each checkpoint notes it.
            is_lead: whether this worker writes.
        """
        super().__init__(**arguments)
        self._config = config
        self._trained = trainable_of(config)
        self._clock = clock
        self._telemetry = telemetry
        self._checkpoints = checkpoints
        self._heldout = heldout
        self._on_saved = on_saved
        self._warn = warn
        self._rows_digest = rows_digest
        self._is_lead = is_lead
        self.rate_share = 1.0
        """The share of the learning rate that is left after spikes."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Calculate the held-out loss over trained tokens, and keep the weights if they are the best yet."""
        self._clock.enter(Phase.evaluation)
        loss = self._heldout(self.state.global_step)
        best = self.state.best_metric
        if self._config.train.keep_best and (best is None or loss < best):
            self._try_to_save(f"best {self._trained.name}", lambda: self._checkpoints.save_best(self.model))
        metrics = {"eval_loss": loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        is_end = self.control.should_training_stop
        self.control.should_save |= is_end and self._config.train.keep_checkpoints > 0
        if not (self.control.should_save or is_end):
            self._telemetry.go_on()
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained alone."""
        self._trained.write(self.model, Path(str(output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read what is trained as it was written."""
        self._trained.load(self.model, Path(resume_from_checkpoint))

    def forget_training(self) -> None:
        """Drop the optimizer and the wrapper on the model's forward; the next training makes them again."""
        self.forget_optimizer()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def save_start(self) -> None:
        """Save a checkpoint before the first step, to go back to."""
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint and complete it. A full disk costs this checkpoint and nothing else.

        Raises: Diverged when a trained weight is not finite: nothing could go on from there."""
        self._clock.enter(Phase.checkpoint)
        step = self.state.global_step
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trained_parameters(self.model)):
            raise Diverged(f"the trained weights are not finite after step {step}", step)
        saved: list[Checkpoint] = []
        self._try_to_save("checkpoint", lambda: saved.append(self._save_complete(model, trial)))
        for checkpoint in saved:
            self._on_saved(checkpoint, float(self.state.epoch))
        if self._is_lead:
            self._checkpoints.remove_torn()
        if step > 0 and not self.control.should_training_stop:
            self._telemetry.go_on()

    def _save_complete(self, model: Any, trial: Any) -> Checkpoint:
        step = self.state.global_step
        super()._save_checkpoint(model, trial)
        facts = {
            "rate_share": self.rate_share,
            "watch": self._telemetry.watch_state(),
            "is_end": self.control.should_training_stop,
            "rows": self._rows_digest,
        }
        return self._checkpoints.complete(self._checkpoints.root / f"checkpoint-{step}", step, facts)

    def _try_to_save(self, what: str, save: Callable[[], None]) -> None:
        """Save, and warn where a file cannot be written."""
        if not self._is_lead:
            return
        try:
            save()
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_disk_fault(error):
                raise
            free = shutil.disk_usage(self._checkpoints.root).free
            self._warn(
                f"the {what} of step {self.state.global_step} was not saved; training goes on and earlier ones are "
                f"kept. The disk has {free / 1e6:.0f} MB free. The error was: {str(error).splitlines()[0]}"
            )


def job_arguments(config: TrialConfig, plan: JobPlan, evaluates: bool) -> dict[str, Any]:
    """Return the part of TrainingArguments that makes a job. The last step is evaluated and saved by Trainer; when else
    is said by JobTelemetry."""
    return {
        "max_steps": plan.steps,
        "lr_scheduler_type": _SCHEDULES[config.train.schedule],
        "warmup_steps": plan.warmup_steps,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": plan.steps,
        "save_strategy": "steps" if plan.saves else "no",
        "save_steps": plan.steps,
        "metric_for_best_model": "loss" if evaluates else None,
        "greater_is_better": False if evaluates else None,
        "restore_callback_states_from_checkpoint": True,  # the count of early stopping
    }


def early_stopping(config: TrialConfig) -> list[TrainerCallback]:
    """Return transformers' callback if the job may end early."""
    patience = config.train.early_stopping
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]
