"""Leave out the rows that the model knows before training, if data.min_perplexity asks for that."""

import time
from dataclasses import replace

from lora_lab.events import Progress
from lora_lab.phase import Phase
from lora_lab.worker.examples import check_filled, packed_rows
from lora_lab.worker.job_plan import plan_job
from lora_lab.worker.screening import Screened, batches_of, row_losses, screen, store_screened, stored_screened
from lora_lab.worker.stages.data_loading import counted
from lora_lab.worker.stages.stage import Stage, TrialContext


def _is_needed(trial: TrialContext) -> bool:
    return trial.config.data.min_perplexity is not None


def _screen(trial: TrialContext) -> None:
    """Screen the rows to train on. The held-out rows stay, so that their loss can be compared with other trials'."""
    config, least = trial.config, trial.config.data.min_perplexity
    assert least is not None

    before = trial.examples
    found = stored_screened(trial.folder, before.digest, least) if config.resume else None
    if found is None:
        found = _find(trial, least)
    if found.dropped:
        trial.warn(found.sentence(least))
    kept = before.documents.chosen(found.kept)
    check_filled(config, len(kept), f"rows whose perplexity is data.min_perplexity={least:g} or more")
    after = before.trained_on(packed_rows(config, kept))
    trial.examples = replace(after, rows_low_perplexity=len(found.dropped))
    if config.train.is_job:
        trial.plan = plan_job(config, len(trial.examples.train))
    trial.emit(counted(trial.examples, config.seq_len))


def _find(trial: TrialContext, least: float) -> Screened:
    """Evaluate every row, and write down what was found for a job that is resumed."""
    config, rows = trial.config, trial.examples.documents

    def progress(done: int, total: int) -> None:
        trial.emit(Progress(t=time.monotonic(), done=done, total=total))

    batches = list(batches_of(rows, config.seq_len))
    mine = row_losses(
        trial.model,
        rows,
        trial.group.share_of(batches),
        trial.padding,
        config.precision.dtype,
        trial.device,
        progress,
    )
    losses = [0.0] * len(rows)
    for places, nats in zip(batches, trial.group.joined(mine, len(batches)), strict=True):
        for place, each in zip(places, nats, strict=True):
            losses[place] = each
    found = screen(rows.trained.tolist(), losses, least)
    if not trial.group.is_lead:
        return found
    try:
        store_screened(trial.folder, found, trial.examples.digest, least)
    except OSError as error:
        trial.warn(f"what data.min_perplexity left out was not written down, so resuming looks again: {error}")
    return found


STAGE = Stage(Phase.screening, _screen, _is_needed)
