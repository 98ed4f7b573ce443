"""4-bit weights unpacked in one kernel, in place of bitsandbytes' three.

bitsandbytes unpacks a weight whose scales are quantised too in three launches (the scales, their offset, the weights),
in the forward and again in the backward. Written in torch's own operations, torch.compile makes one kernel of it. The
products are operations of their own to the layer's compilation: it would else keep the unpacked weight for the
backward, 16 bits a weight of the whole model.
"""

import math
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor


def unpack(
    packed: Tensor,
    code: Tensor,
    scales: Tensor,
    scales_code: Tensor | None,
    scales_scales: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    scales_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weights in their order, one row: for every block its scale times the code of each.

    Args:
        packed: bytes of two weights each, the first in the upper half.
        code: what each of the 16 values stands for.
        scales: one a block of `blocksize` weights; bytes where they are quantised too.
        scales_code: what each of the 256 values of a scale stands for; None where they are plain.
        scales_scales: one a block of `scales_blocksize` scales.
        offset: what the scales lie around.
    """
    if scales_code is not None and scales_scales is not None and offset is not None:
        block = torch.arange(scales.numel(), device=scales.device) // scales_blocksize
        scales = scales_code[scales.int()] * scales_scales[block] + offset
    shifts = 4 - 4 * torch.arange(2, device=packed.device, dtype=torch.uint8)
    halves = (packed.view(-1, blocksize // 2, 1) >> shifts) & 15
    return (code[halves.int()] * scales.view(-1, 1, 1)).to(dtype).view(-1)


_compiled_unpack = torch.compile(unpack, dynamic=False)


def _unpack(packed: Tensor, *state: Any) -> Tensor:
    # whatever forward and backward have autograd and autocast set to: each setting would be one more compilation
    with torch.no_grad(), torch.autocast(packed.device.type, enabled=False, cache_enabled=False):
        return _compiled_unpack(packed.detach(), *state)


@torch.library.custom_op("lora_lab::linear_4bit", mutates_args=())
def linear_4bit(
    x: Tensor,
    packed: Tensor,
    code: Tensor,
    scales: Tensor,
    scales_code: Tensor | None,
    scales_scales: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    scales_blocksize: int,
    outputs: int,
) -> Tensor:
    """X (..., inputs) times the transposed weight (outputs, inputs)."""
    state = (code, scales, scales_code, scales_scales, offset, blocksize, scales_blocksize)
    return torch.nn.functional.linear(x, _unpack(packed, *state, x.dtype).view(outputs, x.shape[-1]))


@torch.library.custom_op("lora_lab::linear_4bit_slope", mutates_args=())
def linear_4bit_slope(
    slope: Tensor,
    packed: Tensor,
    code: Tensor,
    scales: Tensor,
    scales_code: Tensor | None,
    scales_scales: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    scales_blocksize: int,
    inputs: int,
) -> Tensor:
    """The gradient over x, from that over the result: slope (..., outputs) times the weight."""
    state = (code, scales, scales_code, scales_scales, offset, blocksize, scales_blocksize)
    return torch.matmul(slope, _unpack(packed, *state, slope.dtype).view(slope.shape[-1], inputs))


@linear_4bit.register_fake
def _(x: Tensor, *state: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], state[-1])


@linear_4bit_slope.register_fake
def _(slope: Tensor, *state: Any) -> Tensor:
    return slope.new_empty(*slope.shape[:-1], state[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  # torch passes it by name
    x, *tensors, ctx.blocksize, ctx.scales_blocksize, _ = inputs
    ctx.inputs = x.shape[-1]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    found = linear_4bit_slope(slope, *ctx.saved_tensors, ctx.blocksize, ctx.scales_blocksize, ctx.inputs)
    return found, *[None] * 9


linear_4bit.register_autograd(_backward, setup_context=_keep)


class UnpackingLinear4bit(Linear4bit):
    """bitsandbytes' layer, that unpacks its weight so where it is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if not torch.compiler.is_compiling():
            return cast(Tensor, super().forward(x))
        state = self.weight.quant_state
        nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (None, None, None)
        tensors = (self.weight, state.code, state.absmax, *nested)
        sizes = (state.blocksize, state.state2.blocksize if state.nested else 1, self.out_features)
        product = linear_4bit(x.to(self.compute_dtype), *tensors, *sizes)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return cast(Tensor, product.to(x.dtype))


def unpack_in_one_kernel(model: Any) -> None:
    """Let the model's 4-bit layers be such layers; their weights and everything else stays."""
    for module in model.modules():
        # bitsandbytes fills the last block up where it is not whole
        if isinstance(module, Linear4bit) and math.prod(module.weight.quant_state.shape) % module.weight.blocksize == 0:
            module.__class__ = UnpackingLinear4bit
