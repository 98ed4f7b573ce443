"""Checkpoint a decoder layer from outside its compiled code.

transformers checkpoints within the layer's forward, and so within its compiled code. No hook on saved tensors reaches
there, and torch.compile cannot leave the code there, as it must for an MLP in tiles.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


class CheckpointedCall:
    """Calls a decoder layer checkpointed in training."""

    def __init__(self, layer: Any, keeps_random_state: bool) -> None:
        """Take the layer's present call.

        Args:
            layer: a decoder layer.
            keeps_random_state: see `checkpoint_layers`.
        """
        self._layer = layer
        self.call: Callable[..., Any] = layer._compiled_call_impl or layer._call_impl
        """The layer's own call, or that compiled."""
        self._keeps_random_state = keeps_random_state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        if not (self._layer.training and torch.is_grad_enabled()):
            return self.call(*args, **kwargs)
        return self._checkpointed(*args, **kwargs)

    def _checkpointed(self, *args: Any, **kwargs: Any) -> Any:
        kept = self._keeps_random_state
        return checkpoint(self.call, *args, use_reentrant=False, preserve_rng_state=kept, **kwargs)


def checkpoint_layers(layers: Iterable[Any], keeps_random_state: bool) -> None:
    """Checkpoint decoder layers in training.

    Args:
        layers: already compiled, if at all.
        keeps_random_state: True repeats dropout's random numbers in the recomputation.
    """
    for layer in layers:
        # torch calls this instead of the class's own call, hooks included
        layer._compiled_call_impl = CheckpointedCall(layer, keeps_random_state)
