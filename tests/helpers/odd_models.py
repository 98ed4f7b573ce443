"""Tiny models of many architectures as folders, and what can be wrong with such a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lora_lab.config import ModelConfig, TrialConfig
from lora_lab.method_config import MethodConfig, PrecisionConfig
from lora_lab.options import Attention, DType, ModelSource, Quantization

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28}
MIXED = {"num_local_experts": 4, "num_experts_per_tok": 2}
WITHOUT_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
GPT_2 = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama": TEXT,
    "llama_tied": {**TEXT, "model_type": "llama", "tie_word_embeddings": True},
    "gpt2": GPT_2,
    "gemma2": {**TEXT, "sliding_window": 16},
    "gemma3": {"text_config": TEXT, "vision_config": EYES, "mm_tokens_per_image": 4},
    "phi3": TEXT,
    "mixtral": {**WITHOUT_HEAD_DIM, **MIXED},
    "qwen3_moe": {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt_oss": {**TEXT, **MIXED, "intermediate_size": 64},
    "granitemoehybrid": {
        **WITHOUT_HEAD_DIM,
        **MIXED,
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_d_head": 32,
        "mamba_expand": 2,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
    },
    "lfm2": {**WITHOUT_HEAD_DIM, "layer_types": ["full_attention", "conv"]},
    "falcon": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mamba": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
    "bert": {k: v for k, v in WITHOUT_HEAD_DIM.items() if k != "num_key_value_heads"},
}
NO_SDPA = ("gemma2", "gpt_oss", "mamba")


def shapes(name: str) -> dict[str, Any]:
    """The architecture as a config's yaml has it."""
    return {"model_type": name, **SHAPES[name]}


def trial(name: str, folder: Path | None = None, **method: Any) -> TrialConfig:
    """A trial of the model in fp32 on the CPU: of a folder, or with random weights."""
    model = ModelConfig(source=ModelSource.local, path=str(folder) if folder else None)
    if folder is None:
        from lora_lab.options import Weights

        model = ModelConfig(source=ModelSource.hub, weights=Weights.random, architecture=shapes(name))
    return TrialConfig(
        model=model,
        method=MethodConfig(**{"quantization": Quantization.none, **method}),
        precision=PrecisionConfig(dtype=DType.fp32),
        attention=Attention.eager if name in NO_SDPA else Attention.sdpa,
        seq_len=64,
    )


def maker(home: Path) -> Callable[[str], Path]:
    """Return what gives a model's folder below `home`, made when it is first asked for."""

    def folder(name: str) -> Path:
        if not (home / name).exists():
            make(name, home / name)
        return home / name

    return folder


def make(name: str, folder: Path, **saving: Any) -> Path:
    """Save a model with random weights, as save_pretrained leaves it."""
    torch.manual_seed(0)
    fields = shapes(name)
    architecture = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(folder, **saving)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a folder's only weight file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
