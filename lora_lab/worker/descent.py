"""Plain gradient descent on weights in bf16: what a weight needs is one kernel, which rounds at random.

It reads weight and gradient, writes the weight, and holds nothing else. Nothing waits for the card. A CPU has the same
arithmetic in PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from lora_lab.worker.rounding import rounded_by_place

_SMALL = 4096
"""Weights with fewer elements are put into one row and updated together."""
_TOGETHER = 1 << 10
"""Elements that a program of the kernel updates."""
_AT_ONCE = 1 << 24
"""Elements that a CPU updates at once, since it holds each intermediate result."""


class RoundedDescent:
    """Mixed into torch.optim.SGD, before it. Momentum and what else SGD can do is not for it. Weights that a model
    keeps in fp32 are updated without rounding."""

    param_groups: list[dict[str, Any]]

    def __init__(self: Any, params: Any, **arguments: Any) -> None:
        super().__init__(params, **arguments)  # type: ignore[call-arg]
        every = [weight for group in self.param_groups for weight in group["params"]]
        self._numbers = {weight: number for number, weight in enumerate(every)}
        self._scalars: tuple[tuple[Any, ...], Tensor] | None = None

    @torch.no_grad()
    def step(self: Any, closure: Any = None) -> None:
        """Update every weight that has a gradient; the small ones of a group together."""
        for group in self.param_groups:
            small = []
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if weight.dtype is not torch.bfloat16:
                    rate = float(group["lr"])
                    weight.mul_(1 - rate * group["weight_decay"]).sub_(weight.grad, alpha=rate)
                elif weight.numel() < _SMALL:
                    small.append(weight)
                else:
                    self._step_one(weight.detach().view(-1), weight.grad.reshape(-1), weight, group)
            if small:
                held = torch.cat([weight.detach().view(-1) for weight in small])
                self._step_one(held, torch.cat([weight.grad.reshape(-1) for weight in small]), small[0], group)
                parts = held.split([weight.numel() for weight in small])
                views = [part.view_as(weight) for part, weight in zip(parts, small, strict=True)]
                torch._foreach_copy_([weight.detach() for weight in small], views)

    def _step_one(self: Any, held: Tensor, slope: Tensor, weight: Tensor, group: dict[str, Any]) -> None:
        """Update `held` with the random numbers of a weight."""
        state = self.state[weight]
        if not state:
            number = self._numbers.setdefault(weight, len(self._numbers))
            state |= {"step": 0, "key": (torch.initial_seed() + number) % 2**31}
        state["step"] += 1
        call = update_by_kernel if held.device.type == "cuda" else update
        call(held, slope, state["key"], self._scalars_of(group, state["step"], held.device))

    def _scalars_of(self: Any, group: dict[str, Any], step: int, device: torch.device) -> Tensor:
        """Return what is left of a weight, the learning rate and the step, (3,) in fp32, written without waiting for
        the device. torch's SGD adds the decay to the gradient, which is the same."""
        rate = float(group["lr"])
        every = 1 - rate * group["weight_decay"], rate, float(step)
        if self._scalars is None or self._scalars[0] != (*every, device):
            found = torch.cat([torch.full((1,), each, device=device) for each in every])
            self._scalars = (*every, device), found
        scalars: Tensor = self._scalars[1]
        return scalars


def update(weight: Tensor, gradient: Tensor, key: int, scalars: Tensor) -> None:
    """Take one step of gradient descent.

    Args:
        weight: (elements,) in bf16, as the gradient.
        key: this weight's own, of 31 bits.
        scalars: (3,) fp32: what is left of the weight, the learning rate, and the step.
    """
    decay, rate, step = scalars.unbind()
    for number, (held, slope) in enumerate(zip(weight.split(_AT_ONCE), gradient.split(_AT_ONCE), strict=True)):
        exact = decay * held.float() - rate * slope.float()
        held.copy_(rounded_by_place(exact, key, step, number * _AT_ONCE))


def update_by_kernel(weight: Tensor, gradient: Tensor, key: int, scalars: Tensor) -> None:
    """Do the same on a card."""
    from lora_lab.worker import optimizer_triton

    elements = len(weight)
    optimizer_triton.descend[(-(-elements // _TOGETHER),)](weight, gradient, scalars, key, elements, _TOGETHER)
