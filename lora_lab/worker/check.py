"""What is wrong with a trial that only the tokenizer, the model's shapes and the rows can tell."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from lora_lab.config import DataSource, RefusedInput, TrialConfig
from lora_lab.outcome import Unsupported
from lora_lab.worker.data import load_examples
from lora_lab.worker.models import load_architecture, load_tokenizer, refuse_unfit
from lora_lab.worker.training import refuse_optimizer


def check_trials(configs: list[TrialConfig]) -> Iterator[str]:
    """Look at many trials before the first of them starts; nothing is loaded onto a device.

    Yields: for each config what a trial would be refused for; empty where it would not be.
    """
    seen: dict[str, str] = {}

    def once(look: Callable[[TrialConfig], None], config: TrialConfig) -> str:
        key = f"{look.__name__} {config}"
        if key not in seen:
            seen[key] = _fault(look, config)
        return seen[key]

    for config in configs:
        alone = TrialConfig(optimizer=config.optimizer)
        yield once(_look_at_optimizer, alone) or once(_look_at_data, _what_data_needs(config))


def _what_data_needs(config: TrialConfig) -> TrialConfig:
    """The config without what no check of the data reads, so that a grid's points share most checks."""
    blank = TrialConfig()
    return replace(
        config,
        optimizer=blank.optimizer,
        precision=blank.precision,
        tracking=blank.tracking,
        measure=blank.measure,
        learning_rate=blank.learning_rate,
        seed=config.seed if config.data.source is DataSource.random_tokens else 0,
    )


def _look_at_optimizer(config: TrialConfig) -> None:
    refuse_optimizer(config.optimizer)


def _look_at_data(config: TrialConfig) -> None:
    architecture = load_architecture(config.model)
    refuse_unfit(config, architecture)
    load_examples(config, load_tokenizer(config.model), architecture.get_text_config().vocab_size)


def _fault(look: Callable[[TrialConfig], None], config: TrialConfig) -> str:
    try:
        look(config)
    except RefusedInput as refusal:
        return str(refusal)
    except (Unsupported, OSError, RuntimeError):
        return ""  # this machine's state, not the user's words: the trial itself will tell
    return ""
