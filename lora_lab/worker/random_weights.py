"""Random weights that are made one tensor at a time, when transformers asks for it, as it would read a file."""

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
        module = self._model.get_submodule(self._module)
        alone = copy.copy(module)  # with parameters of its own; its children stay without memory
        # zeros, for the rare weight that the rule leaves as it was constructed
        alone._parameters = {
            name: None if p is None else nn.Parameter(torch.zeros_like(p, device=self._device), requires_grad=False)
            for name, p in module._parameters.items()
        }
        with torch.no_grad():
            self._owner()._init_weights(alone)
        made: Tensor = alone._parameters[self._name].data
        return made

    def _owner(self) -> Any:
        """The innermost model that the module belongs to: a model within another has a rule of its own."""
        owner = self._model
        path = self._module.split(".")
        for length in range(1, len(path) + 1):
            inner = self._model.get_submodule(".".join(path[:length])) if self._module else owner
            if isinstance(inner, PreTrainedModel):
                owner = inner
        return owner


def random_state(skeleton: Any, device: torch.device) -> dict[str, RandomTensor]:
    """Every weight of a model on the meta device, to be made on `device`; buffers are left to transformers."""
    return {name: RandomTensor(skeleton, name, device) for name, _ in skeleton.named_parameters()}
