"""Leave out the rows that the model knows before training, if data.min_perplexity asks for that."""

import time
from dataclasses import replace

from lora_lab.events import Progress
from lora_lab.phase import Phase
from lora_lab.worker.data import check_filled, packed_rows
from lora_lab.worker.job_plan import plan_job
from lora_lab.worker.screening import row_losses, screen
from lora_lab.worker.stages.data_loading import counted
from lora_lab.worker.stages.stage import Stage, TrialContext


def _is_needed(trial: TrialContext) -> bool:
    return trial.config.data.min_perplexity is not None


def _screen(trial: TrialContext) -> None:
    """Screen the rows to train on. The held-out rows stay, so that their loss can be compared with other trials'."""
    config, least = trial.config, trial.config.data.min_perplexity
    assert least is not None

    def progress(done: int, total: int) -> None:
        trial.emit(Progress(t=time.monotonic(), done=done, total=total))

    rows = trial.examples.train
    losses = row_losses(
        trial.model, rows, config.seq_len, trial.padding, config.precision.dtype, trial.device, progress
    )
    found = screen(rows, losses, least)
    if found.dropped:
        trial.warn(found.sentence(least))
    check_filled(config, len(found.kept), f"rows whose perplexity is data.min_perplexity={least:g} or more")
    trial.examples = replace(
        trial.examples, train=packed_rows(config, found.kept), rows_low_perplexity=len(found.dropped)
    )
    if config.train.is_job:
        trial.plan = plan_job(config, len(trial.examples.train))
    trial.emit(counted(trial.examples, config.seq_len))


STAGE = Stage(Phase.screening, _screen, _is_needed)
