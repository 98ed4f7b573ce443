"""Loading a model as a trial does."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError

from lora_lab.config import InvalidInput, ModelConfig, TrialConfig
from lora_lab.method_config import MethodConfig, PrecisionConfig
from lora_lab.options import Attention, DType, ModelSource, Quantization, Weights
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.pretrained import from_pretrained

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28}


def test_no_model_keeps_a_cache_in_training_also_not_one_within_another() -> None:
    """Keys and values of a whole row would be kept for nothing, and twice where a layer is calculated again."""
    nested = {"model_type": "gemma3", "text_config": TEXT, "vision_config": EYES, "mm_tokens_per_image": 4}
    config = TrialConfig(
        model=ModelConfig(source=ModelSource.hub, weights=Weights.random, architecture=nested),
        method=MethodConfig(quantization=Quantization.none, target_modules=["q_proj"]),
        precision=PrecisionConfig(dtype=DType.fp32),
        attention=Attention.eager,
    )
    model = load_model(config, load_architecture(config.model), torch.device("cpu")).train()
    ids = torch.randint(3, 60, (1, 8))
    out = model(input_ids=ids, token_type_ids=torch.zeros_like(ids), labels=ids)
    assert out.past_key_values is None


class Gated:
    """Stands for a class of transformers where the hub refuses the model's files."""

    @staticmethod
    def from_pretrained(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.") from GatedRepoError("403", response=Mock())


def test_a_gated_model_says_what_to_do() -> None:
    model = ModelConfig(source=ModelSource.hub, id="me/mine")
    with pytest.raises(InvalidInput, match=r"me/mine is gated.*licence.*hf auth login.*weights=random"):
        from_pretrained(Gated, model)
