"""Evaluate the held-out rows, before and after training."""

import time
from functools import partial

from lora_lab.events import Evaluated, Phase, Progress
from lora_lab.worker.data import Example
from lora_lab.worker.evaluation import heldout_loss
from lora_lab.worker.stages.stage import Stage, TrialContext


def heldout_rows(trial: TrialContext) -> list[Example]:
    """Return the held-out rows that are evaluated."""
    return trial.examples.heldout[: trial.config.measure.eval_rows]


def _is_needed(trial: TrialContext) -> bool:
    return bool(heldout_rows(trial))


def evaluate(trial: TrialContext, phase: Phase, step: int | None = None) -> float:
    """Evaluate the held-out rows in the present phase and send the result.

    Args:
        step: the step of a job after which it is; None before and after training.

    Returns: nats per trained token.
    """
    config, rows = trial.config, heldout_rows(trial)

    def progress(done: int, total: int) -> None:
        trial.emit(Progress(t=time.monotonic(), done=done, total=total))

    loss, tokens = heldout_loss(
        trial.model, rows, config.batch_size, trial.padding, config.precision.dtype, trial.device, progress
    )
    trial.emit(Evaluated(t=time.monotonic(), phase=phase.value, loss=loss, rows=len(rows), tokens=tokens, step=step))
    return loss


def _evaluate(phase: Phase, trial: TrialContext) -> None:
    evaluate(trial, phase)


def _stage(phase: Phase) -> Stage:
    return Stage(phase, partial(_evaluate, phase), _is_needed)


BEFORE = _stage(Phase.evaluation_before)
AFTER = _stage(Phase.evaluation_after)
