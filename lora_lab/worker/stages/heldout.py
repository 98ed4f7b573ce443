"""Evaluate the held-out rows and the general text, before and after training."""

import time
from functools import partial

from lora_lab.events import GENERAL, HELDOUT, Evaluated, Progress, RowLosses
from lora_lab.phase import Phase
from lora_lab.worker.data import Example
from lora_lab.worker.evaluation import Losses, digest_of, row_losses
from lora_lab.worker.general_text import general_examples, general_rows
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.tokenizer_files import load_tokenizer


def heldout_rows(trial: TrialContext) -> list[Example]:
    """Return the held-out rows that are evaluated."""
    return trial.examples.heldout[: trial.config.measure.eval_rows]


def _is_needed(trial: TrialContext) -> bool:
    return bool(heldout_rows(trial)) or general_rows(trial.config) > 0


def evaluate(trial: TrialContext, phase: Phase, step: int | None = None) -> float:
    """Evaluate the held-out rows in the present phase and send the result.

    Args:
        step: the step of a job after which it is; None before and after training.

    Returns: nats per trained token.
    """
    rows = heldout_rows(trial)
    losses = _send_losses(trial, rows, HELDOUT, phase, step)
    found = Evaluated(
        t=time.monotonic(), phase=phase.value, loss=losses.mean, rows=len(rows), tokens=sum(losses.tokens), step=step
    )
    trial.emit(found)
    return found.loss


def _send_losses(trial: TrialContext, rows: list[Example], text: str, phase: Phase, step: int | None = None) -> Losses:
    config = trial.config

    def progress(done: int, total: int) -> None:
        trial.emit(Progress(t=time.monotonic(), done=done, total=total))

    mine = row_losses(
        trial.model,
        trial.group.share_of(rows),
        config.batch_size,
        trial.padding,
        config.precision.dtype,
        trial.device,
        progress,
    )
    losses = Losses(trial.group.joined(mine.nats, len(rows)), [row.trained for row in rows])
    trial.emit(
        RowLosses(
            t=time.monotonic(),
            phase=phase.value,
            text=text,
            nats=[float(f"{nats:.6g}") for nats in losses.nats],
            tokens=losses.tokens,
            digest=digest_of(rows),
            step=step,
        )
    )
    return losses


def _evaluate(phase: Phase, trial: TrialContext) -> None:
    if heldout_rows(trial):
        evaluate(trial, phase)
    if general_rows(trial.config):
        _send_losses(trial, _general(trial), GENERAL, phase)


def _general(trial: TrialContext) -> list[Example]:
    vocab_size = trial.architecture.get_text_config().vocab_size
    return general_examples(trial.config, load_tokenizer(trial.config.model), vocab_size)


def _stage(phase: Phase) -> Stage:
    return Stage(phase, partial(_evaluate, phase), _is_needed, each_member=True)


BEFORE = _stage(Phase.evaluation_before)
AFTER = _stage(Phase.evaluation_after)
