"""AdamW with its state in 8 bit, for weights in fp32 or bf16: what each weight needs is one kernel.

The state is as bitsandbytes keeps it: codes by its dynamic maps with a scale for each 256 elements. All arithmetic is
in fp32, and weights in bf16 are rounded at random within the kernel. It reads weight, gradient and state, writes weight
and state, and holds nothing else. Nothing waits for the card. A CPU has the same arithmetic in PyTorch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lora_lab.worker.dynamic_codes import BLOCK, Maps, decoded, dynamic_maps, encode_into
from lora_lab.worker.rounding import round_into, rounded_by_place

SMALL = 4096
"""Weights with fewer elements keep their state in fp32, as do those that are no whole number of blocks."""
_TOGETHER = 4
"""Blocks that a program of the kernel updates."""
_AT_ONCE = 1 << 16
"""Blocks that a CPU updates at once, since it holds each intermediate result."""
_MOST_SCALARS = 8
"""Steps and learning rates whose scalars are kept; a step has as many as there are groups that differ."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW, decoupled weight decay and bias corrections as torch.optim.AdamW has them."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameters or groups of them, as torch.optim.AdamW.

        Raises: ValueError."""
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or min(lr, eps, weight_decay) < 0:
            raise ValueError(
                f"betas={tuple(betas)} have to be two numbers from 0 to below 1, and lr={lr:g}, eps={eps:g} and "
                f"weight_decay={weight_decay:g} may not be negative"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        every = [weight for group in self.param_groups for weight in group["params"]]
        self._numbers = {weight: number for number, weight in enumerate(every)}
        self._maps: dict[torch.device, Maps] = {}
        self._scalars: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every weight that has a gradient; the small ones of a group together."""
        for group in self.param_groups:
            small = []
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if weight.numel() < SMALL or weight.numel() % BLOCK:
                    small.append(weight)
                else:
                    self._step_coded(weight, group)
            if small:
                self._step_small(small, group)

    def _step_coded(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight] or self._begin(weight)
        state["step"] += 1
        assert weight.grad is not None
        held, slope = weight.detach().view(-1, BLOCK), weight.grad.reshape(-1, BLOCK)
        coded = [state[name] for name in ("codes_1", "scales_1", "codes_2", "scales_2")]
        maps, scalars = self._maps_on(weight.device), self._scalars_of(group, state["step"], weight.device)
        call: Callable[..., None] = update_by_kernel if weight.device.type == "cuda" else update
        call(held, slope, *coded, state["key"], *maps, scalars)

    def _begin(self, weight: Tensor) -> dict[str, Any]:
        """Make the state of zeros. `key` is what makes its random numbers differ from those of other weights."""
        shape, device = (weight.numel() // BLOCK, BLOCK), weight.device
        zero = int((self._maps_on(device).numbers[0] == 0).nonzero())
        number = self._numbers.setdefault(weight, len(self._numbers))
        key = (torch.initial_seed() + number) % 2**31
        self.state[weight] = {
            "step": 0,
            "codes_1": torch.full(shape, zero, dtype=torch.uint8, device=device),
            "scales_1": torch.zeros(shape[0], device=device),
            "codes_2": torch.zeros(shape, dtype=torch.uint8, device=device),
            "scales_2": torch.zeros(shape[0], device=device),
            "key": torch.full((), key, dtype=torch.int32, device=device),
        }
        found: dict[str, Any] = self.state[weight]
        return found

    def _maps_on(self, device: torch.device) -> Maps:
        if device not in self._maps:
            self._maps[device] = dynamic_maps(device)
        return self._maps[device]

    def _scalars_of(self, group: dict[str, Any], step: int, device: torch.device) -> Tensor:
        """Return what the kernel needs of a group at a step, (7,) in fp32, written without waiting for the device."""
        rate, (beta1, beta2) = float(group["lr"]), group["betas"]
        known = (step, rate, beta1, beta2, group["eps"], group["weight_decay"], device)
        if known not in self._scalars:
            if len(self._scalars) == _MOST_SCALARS:
                self._scalars.clear()
            decay = 1 - rate * group["weight_decay"]
            size, root = rate / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
            every = (decay, size, root, group["eps"], 1 - beta1, 1 - beta2, step)
            self._scalars[known] = torch.cat([torch.full((1,), float(each), device=device) for each in every])
        return self._scalars[known]

    def _step_small(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Update small weights by torch's fused AdamW, then round those in bf16."""
        for weight in weights:
            if not self.state[weight]:
                zeros = {name: torch.zeros_like(weight, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
                self.state[weight] |= {"step": torch.zeros((), device=weight.device), **zeros}
        states = [self.state[weight] for weight in weights]
        exact = [weight.detach().float() for weight in weights]  # in fp32 it is the weight itself
        adamw(
            exact,
            [weight.grad.float() for weight in weights if weight.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        narrow = [(weight, each) for weight, each in zip(weights, exact, strict=True) if weight.dtype is torch.bfloat16]
        if narrow:
            flat = torch.cat([each.view(-1) for _, each in narrow])
            held = torch.empty_like(flat, dtype=torch.bfloat16)
            round_into(held, flat)
            parts = held.split([each.numel() for _, each in narrow])
            views = [part.view_as(weight) for (weight, _), part in zip(narrow, parts, strict=True)]
            torch._foreach_copy_([weight.detach() for weight, _ in narrow], views)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state as it is. torch's own would convert the codes to the weights' format."""
        super().load_state_dict({**state_dict, "state": {}})
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, saved in state_dict["state"].items():
            weight = weights[number]
            self.state[weight] = {
                name: each.to(weight.device, copy=True) if torch.is_tensor(each) else each
                for name, each in saved.items()
            }


def update(
    weight: Tensor,
    gradient: Tensor,
    codes_1: Tensor,
    scales_1: Tensor,
    codes_2: Tensor,
    scales_2: Tensor,
    key: Tensor,
    numbers: Tensor,
    lowest: Tensor,
    midpoints: Tensor,
    scalars: Tensor,
) -> None:
    """Take one step of AdamW: change weight, codes and scales.

    Args:
        weight: (blocks, 256), bf16 or fp32, as the gradient.
        codes_1: (blocks, 256) uint8, of the first moment; codes_2 of the second.
        scales_1: (blocks,) fp32.
        key: () int32, this weight's own.
        numbers: with lowest and midpoints, see Maps.
        scalars: (7,) fp32: what is left of the weight, the learning rate over the first correction, one over the root
            of the second, epsilon, what is new of each moment, and the step.
    """
    decay, size, root, eps, new_1, new_2, step = scalars.unbind()
    by_block = (weight, gradient, codes_1, scales_1, codes_2, scales_2)
    for number, part in enumerate(zip(*(each.split(_AT_ONCE) for each in by_block), strict=True)):
        held, slope, *coded = part
        slope = slope.float()
        first = decoded(coded[0], coded[1], numbers[0])
        second = decoded(coded[2], coded[3], numbers[1])
        first = first + new_1 * (slope - first)
        second = second + new_2 * (slope * slope - second)
        exact = decay * held.float() - size * first / (second.sqrt() * root + eps)
        encode_into(coded[0], coded[1], first, lowest[0], midpoints[0])
        encode_into(coded[2], coded[3], second, lowest[1], midpoints[1])
        if weight.dtype is torch.bfloat16:
            exact = rounded_by_place(exact, key, step, number * _AT_ONCE * BLOCK)
        held.copy_(exact)


def update_by_kernel(*given: Tensor) -> None:
    """Do the same on a card."""
    from lora_lab.worker import optimizer_triton

    blocks, is_narrow = len(given[0]), given[0].dtype is torch.bfloat16
    optimizer_triton.adamw_8bit[(-(-blocks // _TOGETHER),)](*given, blocks, is_narrow, _TOGETHER, BLOCK)
