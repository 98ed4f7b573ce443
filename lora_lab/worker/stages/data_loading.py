"""Check the model's files and shapes, and turn the rows into tokens."""

import time

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.events import DataCounted, Progress
from lora_lab.options import DataSource, Duplicates
from lora_lab.phase import Phase
from lora_lab.worker.check import checked_architecture, checked_examples
from lora_lab.worker.checkpoints import Checkpoints
from lora_lab.worker.examples import Examples
from lora_lab.worker.job_plan import plan_job
from lora_lab.worker.lengths import lengths_of
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.tokenising import Report
from lora_lab.worker.trainables import trainable_of

_REPORT_SECONDS = 1.0


def _load(trial: TrialContext) -> None:
    config = trial.config
    trial.architecture, remarks = checked_architecture(config)
    for remark in remarks:
        trial.warn(remark)
    trial.examples, trial.padding = checked_examples(config, trial.architecture, _reporter(trial))
    if config.train.is_job:
        trial.plan = plan_job(config, len(trial.examples.train))
    found = counted(trial.examples, config.seq_len)
    trial.emit(found)
    trial.rows_digest = found.digest
    if config.train.is_job and config.resume:
        _check_same(trial)
    for warning in warnings_of(config, trial.examples):
        trial.warn(warning)
    if trial.plan is not None and trial.plan.rows_left_out:
        trial.warn(
            f"each epoch leaves out {trial.plan.rows_left_out} of {len(trial.examples.train)} training rows, other "
            f"rows each time, since a batch has batch_size={config.batch_size}{_of_workers(config)}"
        )


def _of_workers(config: TrialConfig) -> str:
    count = config.placement.world_size
    return f" on each of {count} workers" if count > 1 else ""


def _check_same(trial: TrialContext) -> None:
    """Raise InvalidInput when a job would go on with other rows than it began with: a file can be written to."""
    config = trial.config
    checkpoint = Checkpoints(trial.folder, config.train.keep_checkpoints, trainable_of(config)).newest()
    if checkpoint is not None and checkpoint.facts.get("rows", trial.rows_digest) != trial.rows_digest:
        raise InvalidInput(
            f"the rows are not those that the job was trained on until step {checkpoint.step}: the data was changed, "
            "or the tokenizer makes other tokens of it. Put the data back as it was, or start a new job: leave out "
            "resume=true and hydra.run.dir."
        )


def _reporter(trial: TrialContext) -> Report:
    """Return what sends how many rows are done, once per second."""
    sent = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal sent
        now = time.monotonic()
        if now - sent >= _REPORT_SECONDS:
            sent = now
            trial.emit(Progress(t=now, done=done, total=total))

    return report


def counted(examples: Examples, seq_len: int) -> DataCounted:
    """Return what is recorded of the rows."""
    lengths = lengths_of(examples, seq_len)
    return DataCounted(
        t=time.monotonic(),
        rows_read=examples.rows_read,
        rows_train=len(examples.train),
        rows_heldout=len(examples.heldout),
        rows_truncated=examples.rows_truncated,
        rows_without_labels=examples.rows_without_labels,
        real=int(examples.documents.sizes.sum()),
        trained=int(examples.documents.trained.sum()),
        digest=examples.digest,
        rows_lost=examples.rows_lost,
        rows_apart=examples.rows_apart,
        end_of_turn=examples.end_of_turn,
        kinds=examples.kinds,
        rows_repeated=examples.rows_repeated,
        rows_heldout_prompt_trained=examples.rows_heldout_prompt_trained,
        rows_near_repeated=examples.rows_near_repeated,
        rows_dropped=examples.rows_dropped,
        rows_in_both=examples.rows_in_both,
        rows_low_perplexity=examples.rows_low_perplexity,
        length_median=lengths.median,
        length_p95=lengths.p95,
        length_max=lengths.most,
        tokens_cut=lengths.cut,
        from_cache=examples.from_cache,
    )


def warnings_of(config: TrialConfig, examples: Examples) -> list[str]:
    """Return what the user should know of the rows."""
    if config.data.source is DataSource.random_tokens:
        return []
    warnings = list(examples.remarks)
    if examples.rows_without_labels:
        warnings.append(
            f"{examples.rows_without_labels} of {examples.rows_read} rows have no token to train on within "
            f"seq_len={config.seq_len} and are left out"
        )
    if examples.rows_truncated > 0.05 * examples.rows_read:
        warnings.append(
            f"{examples.rows_truncated} of {examples.rows_read} rows are longer than seq_len={config.seq_len} "
            "and are cut"
        )
    if config.data.rows and examples.rows_read < config.data.rows:
        warnings.append(f"data.rows={config.data.rows}, and the data has only {examples.rows_read} rows")
    warnings += _about_duplicates(config.data.duplicates, examples)
    if examples.rows_in_both:
        warnings.append(
            f"{examples.rows_in_both} of {examples.rows_read} rows are in data.heldout_path too and are not trained on"
        )
    if examples.rows_heldout_prompt_trained:
        warnings.append(
            f"{examples.rows_heldout_prompt_trained} of {len(examples.heldout)} held-out rows have a prompt that is "
            "trained on too, with another answer"
        )
    return warnings


def _about_duplicates(duplicates: Duplicates, examples: Examples) -> list[str]:
    repeated, near, read = examples.rows_repeated, examples.rows_near_repeated, examples.rows_read
    said = []
    if duplicates is not Duplicates.keep and examples.rows_dropped:
        said.append(f"data.duplicates={duplicates.name} left out {examples.rows_dropped} of {read} rows")
    elif repeated:
        said.append(
            f"{repeated} of {read} rows are equal to an earlier one; equal rows are held out together, or trained on "
            "together (data.duplicates=exact drops them)"
        )
    if near and duplicates is not Duplicates.near:
        said.append(
            f"{near} of {read} rows have nearly the same words as an earlier or a held-out one, so that held-out rows "
            "may have been seen in training (data.duplicates=near drops them)"
        )
    return said


STAGE = Stage(Phase.data, _load)
