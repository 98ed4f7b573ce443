"""Update each weight inside the backward, as soon as its gradient is there, so that no two gradients are held at once.

Any optimizer serves. It looks at the weights that have a gradient, and while the backward runs that is one. What needs
all gradients together is not possible: to clip them by their norm, to add up those of several micro-batches, to
exchange them between workers, or to look for an overflow before the first update.
"""

from typing import Any

from torch import Tensor

from lora_lab.worker.pieces import InPieces


class InBackward:
    """Mixed into an optimizer's class, before it."""

    def __init__(self: Any, params: Any, **arguments: Any) -> None:
        super().__init__(params, **arguments)  # type: ignore[call-arg]
        known = [weight for group in self.param_groups for weight in group["params"]]
        weights = list(self.pieces) if isinstance(self, InPieces) else known
        self._hooks = [weight.register_post_accumulate_grad_hook(self._update) for weight in weights]

    def _update(self: Any, weight: Tensor) -> None:
        super().step()  # type: ignore[misc]
        weight.grad = None

    def step(self, closure: Any = None) -> None:
        """Do nothing: by the end of the backward every weight has its update."""

    def release(self: Any) -> None:
        """Update nothing any more."""
        for hook in self._hooks:
            hook.remove()
