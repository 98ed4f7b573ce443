"""Train every weight of a model, with nothing wrapped around it.

The weights are held in fp32, and autocast multiplies in the trial's precision. Held in bf16, they are updated as
`rounding` says.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from lora_lab.base_weights import MODEL
from lora_lab.method_config import MethodConfig

_ONE_FILE = "1000000GB"
"""The size from which transformers would split the weights into several files."""


class Full:
    """Trains all weights, and leaves a model as from_pretrained loads it."""

    name = MODEL
    files = (SAFE_WEIGHTS_NAME, CONFIG_NAME)

    def __init__(self, method: MethodConfig) -> None:
        self.dtype: torch.dtype = getattr(torch, method.held_in.value)

    def loads_in(self, working: torch.dtype) -> torch.dtype:
        """Return the format that weights are held in, whatever products are in."""
        return self.dtype

    def check(self, skeleton: Any) -> None:
        """Let every weight of the skeleton require a gradient; any model can be trained whole."""
        skeleton.requires_grad_(True)

    def build(self, model: Any, unreached: Sequence[str]) -> Any:
        """Let every weight require a gradient, but for modules that text never runs through."""
        model.requires_grad_(True)
        for name in unreached:
            model.get_submodule(name).requires_grad_(False)
        return model

    def write(self, model: Any, folder: Path) -> None:
        """Write the whole model, in the format that it is trained in."""
        model.save_pretrained(folder, max_shard_size=_ONE_FILE)

    def load(self, model: Any, folder: Path) -> None:
        """Copy the weights of a written model."""
        load_model(model, folder / SAFE_WEIGHTS_NAME)
