"""Update each weight inside the backward, as soon as its gradient is there, so that no two gradients are held at once.

Any optimizer serves: while it steps, its groups have this one weight, so that it need not look through all others.
Small weights, biases and norms, wait for the end of the backward: each update costs time, and their gradients hardly
take memory. What needs all gradients together is not possible: to clip them by their norm, to add up those of several
micro-batches, to exchange them between workers, or to look for an overflow before the first update.
"""

from typing import Any

from torch import Tensor

from lora_lab.worker.pieces import InPieces

SMALL = 4096
"""Weights with fewer elements are updated together."""


class InBackward:
    """Mixed into an optimizer's class, before it."""

    def __init__(self: Any, params: Any, **arguments: Any) -> None:
        super().__init__(params, **arguments)  # type: ignore[call-arg]
        self._own: dict[Tensor, tuple[int, list[Tensor]]] = {}
        """Of each weight the number of its group, and what the optimizer has of it: its pieces, or itself."""
        pieces = self.pieces if isinstance(self, InPieces) else {}
        groups = {each: number for number, group in enumerate(self.param_groups) for each in group["params"]}
        for weight in pieces or groups:
            own = pieces.get(weight, [weight])
            self._own[weight] = groups[own[0]], own
        self._small = [weight for weight in self._own if weight.numel() < SMALL and not _knows_by_number(self)]
        waiting = set(self._small)
        now = [weight for weight in self._own if weight not in waiting]
        self._hooks = [weight.register_post_accumulate_grad_hook(self._update) for weight in now]

    def _update(self: Any, weight: Tensor) -> None:
        if _knows_by_number(self):
            super().step()  # type: ignore[misc]
        else:
            self._step_alone(weight)
        weight.grad = None

    def _step_alone(self: Any, weight: Tensor) -> None:
        number, own = self._own[weight]
        groups: list[dict[str, Any]] = self.param_groups
        group = groups[number]
        every = group["params"]
        group["params"], self.param_groups = own, [group]
        try:
            super().step()  # type: ignore[misc]
        finally:
            group["params"], self.param_groups = every, groups

    def step(self: Any, closure: Any = None) -> None:
        """Update the small weights. By the end of the backward all others have their update."""
        if self._small:
            super().step()  # type: ignore[misc]
        for weight in self._small:
            weight.grad = None

    def release(self: Any) -> None:
        """Update nothing any more."""
        self._small = []
        for hook in self._hooks:
            hook.remove()


def _knows_by_number(optimizer: Any) -> bool:
    """Return whether it is one of bitsandbytes', which know the embeddings by their number in the groups. So they see
    all groups, and no weight may wait with its gradient: it would be updated with each of the others."""
    return hasattr(optimizer, "mng")
