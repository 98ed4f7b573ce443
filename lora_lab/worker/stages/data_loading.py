"""Check the model's files and shapes, and turn the rows into tokens."""

import time

from lora_lab.config import TrialConfig
from lora_lab.events import DataCounted, Phase
from lora_lab.options import DataSource
from lora_lab.worker.check import checked_architecture, checked_examples
from lora_lab.worker.data import Examples
from lora_lab.worker.job_plan import plan_job
from lora_lab.worker.stages.stage import Stage, TrialContext


def _load(trial: TrialContext) -> None:
    config = trial.config
    trial.architecture, remarks = checked_architecture(config)
    for remark in remarks:
        trial.warn(remark)
    trial.examples, trial.padding = checked_examples(config, trial.architecture)
    if config.train.is_job:
        trial.plan = plan_job(config, len(trial.examples.train))
    trial.emit(_counted(trial.examples))
    for warning in _warnings(config, trial.examples):
        trial.warn(warning)
    if trial.plan is not None and trial.plan.rows_left_out:
        trial.warn(
            f"each epoch leaves out {trial.plan.rows_left_out} of {len(trial.examples.train)} training rows, other "
            f"rows each time, since a batch has batch_size={config.batch_size}"
        )


def _counted(examples: Examples) -> DataCounted:
    return DataCounted(
        t=time.monotonic(),
        rows_read=examples.rows_read,
        rows_train=len(examples.train),
        rows_heldout=len(examples.heldout),
        rows_truncated=examples.rows_truncated,
        rows_without_labels=examples.rows_without_labels,
        real=sum(len(example.ids) for example in examples.train),
        trained=sum(example.trained for example in examples.train),
        digest=examples.digest,
        rows_lost=examples.rows_lost,
        rows_apart=examples.rows_apart,
        end_of_turn=examples.end_of_turn,
        rows_repeated=examples.rows_repeated,
        rows_heldout_prompt_trained=examples.rows_heldout_prompt_trained,
    )


def _warnings(config: TrialConfig, examples: Examples) -> list[str]:
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
    if examples.rows_repeated:
        warnings.append(
            f"{examples.rows_repeated} of {examples.rows_read} rows are equal to an earlier one; equal rows are held "
            "out together, or trained on together"
        )
    if examples.rows_heldout_prompt_trained:
        warnings.append(
            f"{examples.rows_heldout_prompt_trained} of {len(examples.heldout)} held-out rows have a prompt that is "
            "trained on too, with another answer"
        )
    return warnings


STAGE = Stage(Phase.data, _load)
