"""Evaluate the held-out rows, before and after training."""

import time
from functools import partial

from lora_lab.events import Evaluated, Phase, Progress
from lora_lab.worker.data import Example
from lora_lab.worker.evaluation import heldout_loss
from lora_lab.worker.stages.stage import Stage, TrialContext


def _rows(trial: TrialContext) -> list[Example]:
    return trial.examples.heldout[: trial.config.measure.eval_rows]


def _is_needed(trial: TrialContext) -> bool:
    return bool(_rows(trial))


def _evaluate(phase: Phase, trial: TrialContext) -> None:
    config, rows = trial.config, _rows(trial)

    def progress(done: int, total: int) -> None:
        trial.emit(Progress(t=time.monotonic(), done=done, total=total))

    loss, tokens = heldout_loss(
        trial.model, rows, config.batch_size, trial.padding, config.precision.dtype, trial.device, progress
    )
    trial.emit(Evaluated(t=time.monotonic(), phase=phase.value, loss=loss, rows=len(rows), tokens=tokens))


def _stage(phase: Phase) -> Stage:
    return Stage(phase, partial(_evaluate, phase), _is_needed)


BEFORE = _stage(Phase.evaluation_before)
AFTER = _stage(Phase.evaluation_after)
