"""What a method has to say of the weights that it trains, and what a model of any method answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch


class Trainable(Protocol):
    """The part of a model that one trial trains. Its settings are those of `config.method`.

    What is trained requires a gradient and nothing else does. So FLOPs, bytes, the read-back and the engines count
    it in any model, and ask nothing more of a method.
    """

    dtype: torch.dtype
    """The format that trained weights are held in; the read-back compares."""

    def check(self, skeleton: Any) -> None:
        """Look at the model's modules on the meta device, before any weight is loaded. `skeleton` may be changed.

        Raises: InvalidInput for a model that the method can't train as asked."""

    def build(self, model: Any, unreached: Sequence[str]) -> Any:
        """Freeze the loaded model and give it what is trained.

        Args:
            unreached: names of modules that text never runs through.

        Returns: the model that Trainer gets, see `base_of`.

        Raises: InvalidInput as `check`, for what only the loaded model shows."""

    def save(self, model: Any, folder: Path) -> None:
        """Write what was trained below the trial's folder.

        Raises: OSError, SafetensorError."""


def base_of(model: Any) -> Any:
    """Return the causal language model itself, without what a method has wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trained_parameters(model: Any) -> list[torch.Tensor]:
    """List what is trained of a model, in its order."""
    # not parameters(): while training runs, an engine answers that from memory
    return [parameter for _, parameter in model.named_parameters() if parameter.requires_grad]
