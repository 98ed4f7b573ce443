"""What is wrong with a trial that only the tokenizer, the model's shapes and the rows can tell."""

from collections.abc import Callable, Iterator

from lora_lab.config import DataSource, InvalidInput, TrialConfig
from lora_lab.outcome import Unsupported
from lora_lab.worker.data import check_token_ids, load_examples
from lora_lab.worker.models import check_model, load_architecture, load_tokenizer
from lora_lab.worker.training import check_optimizer


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
        yield (
            once(_look_at_optimizer, TrialConfig(optimizer=config.optimizer))
            or once(_look_at_model, _what_the_model_needs(config))
            or once(_look_at_data, _what_data_needs(config))
        )


def _what_the_model_needs(config: TrialConfig) -> TrialConfig:
    """The config without what no check of the model reads, so that a grid's points share most checks."""
    return TrialConfig(
        model=config.model,
        method=config.method,
        precision=config.precision,
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
        seq_len=config.seq_len,
    )


def _what_data_needs(config: TrialConfig) -> TrialConfig:
    """The config without what no check of the data reads."""
    return TrialConfig(
        model=config.model,
        data=config.data,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
        seed=config.seed if config.data.source is DataSource.random_tokens else 0,
    )


def _look_at_optimizer(config: TrialConfig) -> None:
    check_optimizer(config.optimizer)


def _look_at_model(config: TrialConfig) -> None:
    check_model(config, load_architecture(config.model))


def _look_at_data(config: TrialConfig) -> None:
    tokenizer, vocab_size = load_tokenizer(config.model), load_architecture(config.model).get_text_config().vocab_size
    check_token_ids(load_examples(config, tokenizer, vocab_size), tokenizer, vocab_size)


def _fault(look: Callable[[TrialConfig], None], config: TrialConfig) -> str:
    try:
        look(config)
    except InvalidInput as refusal:
        return str(refusal)
    except (Unsupported, OSError, RuntimeError):
        return ""  # this machine's state, not the user's words: the trial itself will tell
    return ""
