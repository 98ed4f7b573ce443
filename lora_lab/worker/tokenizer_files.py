"""Load the tokenizer of a trial's model, and write it next to what was made of the model."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lora_lab.config import InvalidInput, ModelConfig
from lora_lab.options import Weights
from lora_lab.worker.checkpoint import fetch_file
from lora_lab.worker.pretrained import from_pretrained, model_name
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer


def load_tokenizer(model: ModelConfig) -> Any:
    """Load the model's own tokenizer, or make the byte-level one for random weights. Padding is on the right."""
    if model.weights is Weights.random:
        return tiny_tokenizer()
    tokenizer = from_pretrained(AutoTokenizer, model, trust_remote_code=model.trust_remote_code)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise InvalidInput(
            f"the tokenizer of {model_name(model)} names neither a padding token nor an end of text. Set eos_token in "
            "its tokenizer_config.json to the token that ends an answer."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def save_tokenizer(model: ModelConfig, folder: Path) -> None:
    """Write the model's tokenizer and chat template to a folder, and tokenizer.model where the model has that. Newer
    transformers drops it, and llama.cpp's converter makes other tokens of Gemma, Phi-3 and others without it."""
    load_tokenizer(model).save_pretrained(folder)
    sentencepiece = fetch_file(model, "tokenizer.model")
    if sentencepiece is not None:
        shutil.copyfile(sentencepiece, folder / sentencepiece.name)
