"""Start adapters from what 4 bit has lost of the weights, as LoftQ does with one round (arXiv 2310.08659).

PEFT's `replace_lora_weights_loftq` does the same on a GPU alone, and leaves out the factor on B A: with alpha of twice
the rank, its start would be twice what was lost.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lora_lab.config import InvalidInput, ModelConfig
from lora_lab.worker.checkpoint import weight_files
from lora_lab.worker.trainables.start import lora_layers

_ROUNDS = 4
"""Power iterations of the decomposition, which is of a matrix of noise: its singular values hardly fall."""


@torch.no_grad()
def start_from_loss(model: Any, of: ModelConfig) -> None:
    """Give each adapter the first singular vectors of its weight's loss.

    Raises: InvalidInput where the files hold no weight of that name."""
    from bitsandbytes.functional import dequantize_4bit

    places = _places(of)
    for name, layer in lora_layers(model).items():
        weight = layer.get_base_layer().weight
        if not hasattr(weight, "quant_state"):
            continue  # bitsandbytes could not hold it in 4 bit, so nothing is lost
        whole = _whole(places, f"{name.removeprefix('base_model.model.')}.weight")
        lost = whole.to(weight.device, torch.float32) - dequantize_4bit(weight.data, weight.quant_state).float()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        left, size, right = torch.svd_lowrank(lost / layer.scaling["default"], q=len(a), niter=_ROUNDS)
        a.copy_(size.sqrt()[:, None] * right.t())
        b.copy_(left * size.sqrt())


def _places(of: ModelConfig) -> dict[str, Path]:
    """Return the file of each stored tensor."""
    found: dict[str, Path] = {}
    for file in weight_files(of):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _whole(places: dict[str, Path], name: str) -> Tensor:
    """Read a weight as it was before it was put into 4 bit. Checkpoints of a base model leave out the first name."""
    stored = next((each for each in (name, name.partition(".")[2]) if each in places), None)
    if stored is None:
        raise InvalidInput(
            f"method.init=loftq needs the whole weights, and the model's safetensors files have no {name}. Use a model "
            "whose files name its weights as transformers does, or method=qlora."
        )
    with safe_open(places[stored], framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(stored)
    return tensor
