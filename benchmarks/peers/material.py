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

from benchmarks.peers.plan import LINEAR_LAYERS, MADE, RANK, SEED, Cell
from lora_lab.composition.compose import CONF
from lora_lab.worker.data import IGNORED, Example, pack
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer

MODEL = "model"
ADAPTERS = "adapters.safetensors"
MEDIAN_LENGTH = 300
"""Tokens of the median document in packed rows: lengths are log-normal, as those of chat data roughly are."""
SPREAD_OF_LENGTHS = 0.9
"""Standard deviation of the natural logarithm of a length."""
SHORTEST_DOCUMENT = 4


def make(folder: Path, name: str) -> None:
    """Write FOLDER/model (bf16) and FOLDER/adapters.safetensors (fp32)."""
    folder.mkdir(parents=True, exist_ok=True)
    described = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    fields = dict(described["architecture"])
    architecture = AutoConfig.for_model(fields.pop("model_type"), **fields)
    transformers.set_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    save_file(first_adapters(model), folder / ADAPTERS)
    model.save_pretrained(folder / MODEL)
    tiny_tokenizer().save_pretrained(folder / MODEL)
    (folder / MADE).touch()  # last: after a kill, half of it must not be taken for all


def first_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return A uniform as PEFT draws it (kaiming with a = sqrt 5) and B zero, by the name that `adapter_key` gives."""
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
    """Return the adapter that a parameter is, whatever wraps the model; None for any other parameter."""
    found = re.search(r"(layers\.\d+\..+\.lora_[AB])\.", parameter.replace("_orig_mod.", ""))
    return found[1] if found else None


def restart_adapters(model: nn.Module, first: dict[str, Tensor]) -> int:
    """Put the adapters back to their first values, in place; return how many numbers are trained.

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


def rows_of(cell: Cell, count: int, vocabulary: int) -> list[Example]:
    """Return `count` rows of random tokens, all but the first of each document trained.

    A row is one document of exactly `seq_len` tokens, or in a packed cell as many documents of real lengths as fit.
    """
    generator = torch.Generator().manual_seed(SEED)
    if not cell.packed:
        return [_document(cell.seq_len, vocabulary, generator) for _ in range(count)]
    documents: list[Example] = []
    rows: list[Example] = []
    while len(rows) <= count:  # the last row is not full yet
        documents += [_document(_length(cell.seq_len, generator), vocabulary, generator) for _ in range(16)]
        rows = pack(documents, cell.seq_len)
    return rows[:count]


def _document(length: int, vocabulary: int, generator: torch.Generator) -> Example:
    ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
    return Example(ids, [IGNORED, *ids[1:]])


def _length(longest: int, generator: torch.Generator) -> int:
    median = min(MEDIAN_LENGTH, longest / 4)  # short rows hold several documents too
    drawn = math.exp(math.log(median) + SPREAD_OF_LENGTHS * float(torch.randn((), generator=generator)))
    return min(longest, max(SHORTEST_DOCUMENT, round(drawn)))


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
