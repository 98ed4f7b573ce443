"""Read a GGUF file again, to see whether it holds the model and tokenizer that it was made of."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from lora_lab.config import TrialConfig
from lora_lab.worker.models import working_dtype
from lora_lab.worker.pretrained import plain_weights


class UnreadableGguf(Exception):
    """transformers has no reader for this kind of model."""


def load_gguf(file: Path, config: TrialConfig, architecture: Any, device: torch.device) -> Any:
    """Load the file's model with transformers' own reader, its weights unpacked. Config and weights come from the file,
    but for what that reader leaves out.

    Args:
        architecture: the model's transformers config.

    Raises: UnreadableGguf with transformers' reason."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
            return AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                config=_completed(AutoConfig.from_pretrained(file.parent, gguf_file=file.name), architecture),
                dtype=working_dtype(config.precision.dtype, device),
                attn_implementation=config.attention.value,
                device_map={"": device},
                **plain_weights(),
            )
    except (ValueError, NotImplementedError) as reason:
        raise UnreadableGguf(str(reason).splitlines()[0]) from reason


def _completed(read: Any, architecture: Any) -> Any:
    """Put the size of a head and scaled positions into the config that was read. transformers' reader does not know the
    first of every architecture, and ignores the file's `rope_freqs`, which Llama 3.1 and later have."""
    whole = architecture.get_text_config()
    if getattr(whole, "head_dim", None) is not None:
        read.head_dim = whole.head_dim
    rope = getattr(whole, "rope_parameters", None) or {}
    parts = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    if any(each.get("rope_type", "default") != "default" for each in parts):
        read.rope_parameters = rope
    return read


def metadata_faults(file: Path, tokenizer: Any) -> list[str]:
    """Return how the tokenizer in the file differs from the model's, a line for each difference. The file need not have
    weights."""
    reader = GGUFReader(file)

    def of(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    faults = []
    tokens = of("tokenizer.ggml.tokens") or []
    if len(tokens) < len(tokenizer):
        faults.append(f"the file has {len(tokens):,} tokens, and the model's tokenizer has {len(tokenizer):,}")
    if of("tokenizer.ggml.model") == "llama" and len(set(of("tokenizer.ggml.scores") or [])) < 2:
        faults.append(
            "the file's tokens have no scores, by which llama.cpp splits a text: tokenizer.model is missing from the "
            "model's files. Put it there, or run this once with a connection to the hub"
        )
    end = of("tokenizer.ggml.eos_token_id")
    if end != tokenizer.eos_token_id:
        faults.append(f"the file's end of text is token {end}, and the tokenizer's is {tokenizer.eos_token_id}")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if of("tokenizer.chat_template") != template:
        faults.append("the file's chat template is not the tokenizer's")
    return faults
