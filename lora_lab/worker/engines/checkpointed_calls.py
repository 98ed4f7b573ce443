"""Checkpoint a decoder layer: keep its input alone, and calculate it once more in the backward.

Where the layer is compiled whole, the checkpoint is within the compiled code, which then leaves out what the backward
does not need: the last product of the layer. Some versions of transformers checkpoint there and some around it, so
this does not depend on theirs. Code that torch.compile leaves, as for an MLP in tiles, is checkpointed from outside.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lora_lab.worker.shards import call_of, set_call


class CheckpointedCall:
    """Calls a decoder layer checkpointed in training."""

    def __init__(self, layer: Any, keeps_random_state: bool, within: bool) -> None:
        """Take the layer's present call.

        Args:
            layer: a decoder layer.
            keeps_random_state, within: see `checkpoint_layers`.
        """
        self._layer = layer
        self.call: Callable[..., Any] = call_of(layer)
        """The layer's own call, or that compiled."""
        self._once_more: Callable[..., Any] = layer._call_impl if within else self.call
        self._keeps_random_state = keeps_random_state
        own = self._checkpoint
        self._checkpointed = torch.compile(own, fullgraph=True, dynamic=False) if within else own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        if not (self._layer.training and torch.is_grad_enabled()):
            return self.call(*args, **kwargs)
        return self._train(*args, **kwargs)

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpointed(*args, **kwargs)

    def _checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        kept = self._keeps_random_state
        return checkpoint(self._once_more, *args, use_reentrant=False, preserve_rng_state=kept, **kwargs)


def checkpoint_layers(layers: Iterable[Any], keeps_random_state: bool, within: bool = False) -> None:
    """Checkpoint decoder layers in training.

    Args:
        layers: already compiled, if at all.
        keeps_random_state: True repeats dropout's random numbers in the recomputation.
        within: True for layers that are compiled whole.
    """
    for layer in layers:
        set_call(layer, CheckpointedCall(layer, keeps_random_state, within))
