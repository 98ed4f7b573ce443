"""Make random weights one tensor at a time, when transformers asks for one, as it would read a file.

The model's own rule fills them. It is applied as transformers does, from the inside out: to the module that has the
weight, then to each module around it.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class RandomTensor:
    """A weight that does not exist yet; `[...]` makes it on the device, by the model's own rule."""

    def __init__(self, model: Any, name: str, device: torch.device) -> None:
        self._model, self._device = model, device
        self._module, _, self._name = name.rpartition(".")

    def __getitem__(self, _: Any) -> Tensor:
        path = self._module.split(".") if self._module else []
        chain = [self._model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
        owner = next(module for module in reversed(chain) if isinstance(module, PreTrainedModel))
        shadow = copy.copy(chain[-1])
        # zeros, for the rare weight that the rule leaves as it was constructed
        shadow._parameters = {
            name: None if p is None else nn.Parameter(torch.zeros_like(p, device=self._device), requires_grad=False)
            for name, p in shadow._parameters.items()
        }
        made = shadow._parameters[self._name]
        with torch.no_grad():
            owner._init_weights(shadow)
            # a rule for a module may reach into its parts; all others of them stay without memory
            for depth in range(len(path) - 1, chain.index(owner) - 1, -1):
                around = copy.copy(chain[depth])
                around._modules = {**around._modules, path[depth]: shadow}
                shadow = around
                owner._init_weights(shadow)
        assert made is not None
        tensor: Tensor = made.detach()
        return tensor


def random_state(skeleton: Any, device: torch.device) -> dict[str, RandomTensor]:
    """Return every weight of a model on the meta device, to be made on `device`. transformers makes the buffers."""
    return {name: RandomTensor(skeleton, name, device) for name, _ in skeleton.named_parameters()}
