"""What all contenders start from, made once: random weights, a tokenizer, the adapters' first values, the rows.

    python -m benchmarks.peers.material FOLDER MODEL

MODEL names a file of conf/model with an `architecture`. In a process of its own, so that the controller never has a
CUDA context.
"""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.plan import LINEAR_LAYERS, RANK, SEED
from lora_lab.composition.compose import CONF
from lora_lab.worker.data import IGNORED
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer

MODEL = "model"
ADAPTERS = "adapters.safetensors"


def make(folder: Path, name: str) -> None:
    """Write FOLDER/model (bf16) and FOLDER/adapters.safetensors (fp32)."""
    described = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    fields = dict(described["architecture"])
    architecture = AutoConfig.for_model(fields.pop("model_type"), **fields)
    transformers.set_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    save_file(first_adapters(model), folder / ADAPTERS)
    model.save_pretrained(folder / MODEL)
    tiny_tokenizer().save_pretrained(folder / MODEL)


def first_adapters(model: nn.Module) -> dict[str, Tensor]:
    """A uniform as PEFT draws it (kaiming with a = sqrt 5), B zero, by the name that `adapter_key` gives."""
    generator = torch.Generator().manual_seed(SEED)
    made = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in LINEAR_LAYERS:
            bound = 1 / math.sqrt(module.in_features)
            where = name[name.index("layers.") :]
            a = torch.rand(RANK, module.in_features, generator=generator) * 2 * bound - bound
            made[f"{where}.lora_A"] = a
            made[f"{where}.lora_B"] = torch.zeros(module.out_features, RANK)
    return made


def adapter_key(parameter: str) -> str | None:
    """The adapter that a parameter is, whatever wraps the model; None for any other parameter."""
    found = re.search(r"(layers\.\d+\..+\.lora_[AB])\.", parameter.replace("_orig_mod.", ""))
    return found[1] if found else None


def restart_adapters(model: nn.Module, first: dict[str, Tensor]) -> int:
    """Put the adapters back to their first values, in place; returns how many numbers are trained.

    Raises: RuntimeError when what is trained is not exactly these adapters.
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    keys = {name: adapter_key(name) for name in trained}
    if set(keys.values()) != set(first):
        odd = sorted(set(map(str, keys.values())) ^ set(first))
        raise RuntimeError(f"what is trained is not the shared adapters: {len(odd)} differ, {', '.join(odd[:4])} ...")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(first[str(keys[name])])
    return sum(value.numel() for value in trained.values())


def random_rows(count: int, seq_len: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Rows of exactly `seq_len` random tokens, all but the first of them trained."""
    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for ids in torch.randint(vocabulary, (count, seq_len), generator=generator):
        labels = ids.clone()
        labels[0] = IGNORED
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


class InOrder:
    """Rows in their order, again from the first when all are through, whatever the sampler asks for: the stacks'
    samplers need not agree then."""

    def __init__(self, rows: Sequence[Any], length: int) -> None:
        self._rows = rows
        self._length = length
        self._next = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        row = self._rows[self._next % len(self._rows)]
        self._next += 1
        return row


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
