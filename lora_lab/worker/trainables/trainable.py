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

    name: str
    """What is trained, in messages; also the folder in a trial's folder where it is saved: adapter or model."""

    dtype: torch.dtype
    """The format that trained weights are held in; the read-back compares."""

    files: tuple[str, str]
    """The names of the weights' file and of the config's, as `write` leaves them."""

    def loads_in(self, working: torch.dtype) -> torch.dtype:
        """Return the format in which the model's own weights are loaded, where they are not quantised.

        Args:
            working: the format of products."""

    def check(self, skeleton: Any) -> None:
        """Look at the model's modules on the meta device, before any weight is loaded. `skeleton` may be changed.

        Raises: InvalidInput for a model that the method can't train as asked."""

    def build(self, model: Any, unreached: Sequence[str]) -> Any:
        """Freeze the loaded model and give it what is trained.

        Args:
            unreached: names of modules that text never runs through.

        Returns: the model that Trainer gets, see `base_of`.

        Raises: InvalidInput as `check`, for what only the loaded model shows."""

    def write(self, model: Any, folder: Path) -> None:
        """Write what was trained into a folder, which is made if need be.

        Raises: OSError, SafetensorError."""

    def load(self, model: Any, folder: Path) -> None:
        """Copy what `write` has written into the model's own tensors, which an engine may have recorded.

        Raises: OSError, SafetensorError."""


def base_of(model: Any) -> Any:
    """Return the causal language model itself, without what a method has wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_adapters(model: Any) -> bool:
    """Return whether weights were added to the model's own."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def trained_parameters(model: Any) -> list[torch.Tensor]:
    """List what is trained of a model, in its order."""
    # not parameters(): while training runs, an engine answers that from memory
    return [parameter for _, parameter in model.named_parameters() if parameter.requires_grad]
