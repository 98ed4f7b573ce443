"""Train weights that are held in bf16: each is updated in fp32, and rounded at random to one of its two neighbours.

bf16 has 8 bits, so an update of less than about a 256th of its weight would always round away. Rounded up with the
probability of the part that is cut off, the mean over many steps is the update itself (stochastic rounding,
arXiv 2010.06192).

Any optimizer serves: while it steps it sees fp32, so its state and its arithmetic are those of fp32 weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CUT = 1 << 16
"""The numbers that the cut bits of an fp32 number can be: bf16 is its upper half."""

_EXPONENT = 0x7F800000
"""Its bits in an fp32 number; all are set in infinities and in what is no number."""

_AT_ONCE = 1 << 24
"""Elements that are rounded together, which need a random number of 4 bytes each."""


class Rounded:
    """Mixed into an optimizer's class, before it. Weights in fp32 are left to the optimizer."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self: Any, closure: Any = None) -> None:
        """Update every weight that has a gradient; as many together as the largest of them has elements."""
        found = [(weight, weight.grad) for group in self.param_groups for weight in group["params"]]
        found = [(weight, gradient) for weight, gradient in found if gradient is not None]
        for weight, _ in found:
            weight.grad = None
        for part in _parts(found):
            self._step_in_fp32(part)

    def _step_in_fp32(self: Any, part: list[tuple[Any, Tensor]]) -> None:
        held = [weight.data for weight, _ in part]
        for weight, gradient in part:
            weight.data = weight.data.float()
            weight.grad = gradient.float()
        super().step()  # type: ignore[misc]
        for (weight, _), before in zip(part, held, strict=True):
            weight.grad = None
            exact, weight.data = weight.data, before
            round_into(before, exact)

    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        """Take a saved state as it is. torch and bitsandbytes convert it to the weights' format, which is narrower."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        held = [weight.data for weight in weights]
        for weight in weights:
            weight.data = torch.empty(0, device=weight.device)
        super().load_state_dict(state)  # type: ignore[misc]
        for weight, before in zip(weights, held, strict=True):
            weight.data = before


def _parts(found: list[tuple[Any, Tensor]]) -> Iterator[list[tuple[Any, Tensor]]]:
    """Split weights so that no part has more elements than the largest weight."""
    most = max((weight.numel() for weight, _ in found), default=0)
    part: list[tuple[Any, Tensor]] = []
    for weight, gradient in found:
        if part and sum(each.numel() for each, _ in part) + weight.numel() > most:
            yield part
            part = []
        part.append((weight, gradient))
    if part:
        yield part


def round_into(held: Tensor, exact: Tensor) -> None:
    """Round `exact` at random into `held`. Infinities and what is no number stay so.

    Args:
        held: in bf16, contiguous.
        exact: the same shape in fp32; it is overwritten.
    """
    if held.dtype is not torch.bfloat16:
        held.copy_(exact)
        return
    for into, numbers in zip(held.view(-1).split(_AT_ONCE), exact.reshape(-1).split(_AT_ONCE), strict=True):
        bits = numbers.view(torch.int32)
        noise = torch.randint(_CUT, bits.shape, dtype=torch.int32, device=bits.device)
        bits.add_(noise.mul_(numbers.isfinite()))
        into.copy_(bits.bitwise_and_(-_CUT).view(torch.float32))


def rounded_by_place(exact: Tensor, key: Tensor | int, step: Tensor, start: int = 0) -> Tensor:
    """Round at random to what bf16 can hold, by random numbers that are calculated from each element's place.

    So it is a part of any kernel, needs no generator, and gives the same wherever and whenever a weight is updated.

    Args:
        exact: in fp32, a weight of at most 2**31 elements or a part of it.
        key: another for each weight, of 31 bits; as a tensor () int32.
        step: a scalar, another at each call with this key.
        start: the place of its first element.

    Returns: fp32, whose lower 16 bits are 0.
    """
    places = torch.arange(start, start + exact.numel(), dtype=torch.int32, device=exact.device).view(exact.shape)
    noise = _mixed(places + _mixed(key + _mixed(step.to(torch.int32)))) & (_CUT - 1)
    bits = exact.view(torch.int32)
    is_finite = (bits & _EXPONENT) != _EXPONENT
    return (torch.where(is_finite, bits + noise, bits) & -_CUT).view(torch.float32)


def _mixed(bits: Tensor) -> Tensor:
    """Return a hash of 32 bits ("lowbias32" of Wellons' hash-prospector). int32 multiplies modulo 2**32, and its shifts
    bring down the sign, which is masked off."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return bits ^ ((bits >> 16) & 0xFFFF)
