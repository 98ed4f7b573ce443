"""Check the tokenizer, the model's shapes and the rows of a trial before any weight is loaded.

A trial begins with the same functions, so that a sweep's check of its points and a single trial find the same."""

from collections.abc import Callable, Iterator
from typing import Any

from lora_lab.config import EngineConfig, InvalidInput, TrialConfig
from lora_lab.look import Look
from lora_lab.options import DataSource
from lora_lab.outcome import Unsupported
from lora_lab.work import Workload
from lora_lab.worker.examples import Examples, check_token_ids, pad_id
from lora_lab.worker.job_plan import plan_job
from lora_lab.worker.loading import load_examples
from lora_lab.worker.models import check_model, load_architecture
from lora_lab.worker.tokenising import Report, quiet
from lora_lab.worker.tokenizer_files import load_tokenizer
from lora_lab.worker.training import check_optimizer

_KEPT = 2
"""Data sets in tokens that are kept for the next points: they may be large."""


def checked_architecture(config: TrialConfig) -> tuple[Any, list[str]]:
    """Read the transformers config and check the model's shapes and files.

    Returns: the config, and what the user should know.

    Raises: InvalidInput."""
    architecture = load_architecture(config.model)
    return architecture, check_model(config, architecture)


def checked_examples(config: TrialConfig, architecture: Any, report: Report = quiet) -> tuple[Examples, int]:
    """Turn the rows into tokens that the model has.

    Args:
        report: gets the rows that are done so far.

    Returns: the examples, and the token that rows are padded with.

    Raises: InvalidInput."""
    tokenizer, vocab_size = load_tokenizer(config.model), architecture.get_text_config().vocab_size
    examples = load_examples(config, tokenizer, vocab_size, report)
    check_token_ids(examples, tokenizer, vocab_size)
    return examples, pad_id(tokenizer, vocab_size)


Tokenised = Callable[[TrialConfig], tuple[Examples, int]]
"""Gives a config's examples, and the token that rows are padded with."""


def check_trials(
    configs: list[TrialConfig], work_of: Callable[[TrialConfig, Tokenised], Workload | None] | None = None
) -> Iterator[Look]:
    """Look at many trials before the first of them starts; nothing is loaded onto a device.

    Args:
        work_of: counts a trial's work, see works.py; None where that is not wanted.

    Yields: what is known of each config.
    """
    seen: dict[str, tuple[str, ...]] = {}
    rows: dict[str, int] = {}
    kept: dict[str, tuple[Examples, int]] = {}

    def once(check: Callable[[TrialConfig], object], config: TrialConfig) -> tuple[str, ...]:
        key = f"{check.__name__} {config}"
        if key not in seen:
            seen[key] = _faults(check, config)
        return seen[key]

    def check_data(config: TrialConfig) -> None:
        rows[str(config)] = len(examples_of(config)[0].train)

    def examples_of(config: TrialConfig) -> tuple[Examples, int]:
        config = _what_data_needs(config)
        found = kept.get(str(config)) or checked_examples(config, load_architecture(config.model))
        if work_of is not None:
            kept[str(config)] = found
            for old in list(kept)[:-_KEPT]:
                del kept[old]
        return found

    def check_job(config: TrialConfig) -> None:
        count = rows.get(str(_what_data_needs(config)))
        if config.train.is_job and count is not None:
            plan_job(config, count)

    for config in configs:
        faults = (
            once(_check_optimizer, TrialConfig(optimizer=config.optimizer))
            or once(checked_architecture, _what_the_model_needs(config))
            or once(check_data, _what_data_needs(config))
            or _faults(check_job, config)
        )
        yield Look(faults=faults, work=None if faults or work_of is None else work_of(config, examples_of))


def _what_the_model_needs(config: TrialConfig) -> TrialConfig:
    """Return the config without what no check of the model reads, so that a grid's points share most checks."""
    return TrialConfig(
        model=config.model,
        method=config.method,
        precision=config.precision,
        engine=EngineConfig(mlp_tile=config.engine.mlp_tile),
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
        seq_len=config.seq_len,
    )


def _what_data_needs(config: TrialConfig) -> TrialConfig:
    """Return the config without what no check of the data reads."""
    return TrialConfig(
        model=config.model,
        data=config.data,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
        placement=config.placement,
        seed=config.seed if config.data.source is DataSource.random_tokens else 0,
    )


def _check_optimizer(config: TrialConfig) -> None:
    check_optimizer(config.optimizer)


def _faults(check: Callable[[TrialConfig], object], config: TrialConfig) -> tuple[str, ...]:
    try:
        check(config)
    except InvalidInput as refusal:
        return refusal.faults
    except (Unsupported, OSError, RuntimeError):
        return ()  # this machine's state, not the user's input: the trial itself reports it
    return ()
