"""Train the embeddings of a few tokens too, by PEFT: those of a chat template, say, that the model has hardly seen."""

from collections.abc import Sequence
from typing import Any

from peft.utils.other import TrainableTokensWrapper

from lora_lab.config import InvalidInput, ModelConfig
from lora_lab.worker.tokenizer_files import load_tokenizer


def token_ids(texts: Sequence[str], model: ModelConfig) -> list[int]:
    """Return the tokens' ids, each once, in order.

    Raises: InvalidInput for a text that is not one token of the model's."""
    if not texts:
        return []
    tokenizer, found = load_tokenizer(model), set()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InvalidInput(
                f"method.trained_tokens names {text!r}, which the model's tokenizer makes {len(ids)} tokens of. Name "
                "tokens that are one, for example those that begin and end a turn."
            )
        found.add(int(ids[0]))
    return sorted(found)


def trained_token_count(model: Any) -> int:
    """Return how many tokens' embeddings are trained of a live model."""
    wrappers = [m for m in model.modules() if isinstance(m, TrainableTokensWrapper)]
    return max(
        (delta.shape[0] for each in wrappers for delta in each.token_adapter.trainable_tokens_delta.values()), default=0
    )
