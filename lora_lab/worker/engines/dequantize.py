"""Dequantize 4-bit weights in one kernel, where bitsandbytes takes three.

bitsandbytes dequantizes a weight whose scales are quantised too in three launches (the scales, their offset, the
weights), in the forward and again in the backward. Written in torch's own operations, torch.compile makes one kernel of
it. The products are custom operations: compiled with the layer, the dequantized weight would be kept for the backward,
16 bits a weight of the whole model.
"""

from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from lora_lab.worker.engines.compiled import MOST_COMPILATIONS


def has_whole_blocks(layer: Any) -> bool:
    """Return True for a 4-bit layer in which no byte spans two rows and the last block is a whole one."""
    if not isinstance(layer, Linear4bit):
        return False
    outputs, inputs = layer.weight.quant_state.shape
    return bool(inputs % 2 == 0 and outputs * inputs % layer.weight.blocksize == 0)


def packed_weight(layer: Linear4bit) -> tuple[list[Tensor], list[int]]:
    """Return a layer's weight as `dequantized` takes it.

    Returns: bytes of two weights each, the first in the upper half; the code book of 16 values; a scale for each block.
    If the scales are quantised too: their code book of 256 values, a scale for each block of them, and their offset.
    And the sizes of a block of weights and of a block of scales.
    """
    state = layer.weight.quant_state
    tensors = [layer.weight, state.code, state.absmax]
    if not state.nested:
        return tensors, [state.blocksize]
    return [*tensors, state.state2.code, state.state2.absmax, state.offset], [state.blocksize, state.state2.blocksize]


_INTEGERS = {2: (torch.int16, torch.int32), 4: (torch.int32, torch.int64)}
"""By the bytes of a number: the integers of that size, and of twice that size."""


def dequantize(packed: list[Tensor], blocks: list[int], pairs: Tensor, dtype: torch.dtype) -> None:
    """Write the weights: for every block its scale times the code book's values. Two neighbours are written as one
    integer, so that the kernel loads their byte, and the scale of both, once. Loads are what it waits for.

    Args:
        packed, blocks: as from `packed_weight`; or of stacked layers, with an offset for each block of scales.
        pairs: the matrix to write, (outputs, inputs / 2), two neighbours of a row in each number.
        dtype: of a weight in it.
    """
    weights, code, scales, *nested = packed
    if nested:
        scales_code, scales_scales, offset = nested
        block = torch.arange(scales.numel(), device=scales.device) // blocks[1]
        scales = scales_code[scales.int()] * scales_scales[block] + (offset[block] if offset.dim() else offset)
    one, two = _INTEGERS[dtype.itemsize]
    values = weights.view(pairs.shape).int()
    scale = scales.unsqueeze(1).expand(-1, blocks[0] // 2).reshape(pairs.shape)
    first, second = ((code[half] * scale).to(dtype).view(one).to(two) for half in (values >> 4, values & 15))
    bits = 8 * dtype.itemsize
    # neighbours in memory begin with the lower half
    pairs.copy_((second << bits) | (first & (2**bits - 1)))


_compiled_dequantize = torch.compile(dequantize, dynamic=False)


def dequantized(
    packed: list[list[Tensor]],
    blocks: list[int],
    inputs: int,
    dtype: torch.dtype,
    right: Tensor | None = None,
    below: Tensor | None = None,
) -> Tensor:
    """Dequantize layers' weights (outputs, inputs) into one stacked matrix, by one kernel each, and copy what belongs
    to the right of them or below them.

    Args:
        packed, blocks: as from `packed_weight`, of each layer.
        right: further columns, (outputs, an even number).
        below: further rows, (any, inputs).
    """
    outputs = [2 * layer[0].numel() // inputs for layer in packed]
    columns = 0 if right is None else right.shape[1]
    rows = 0 if below is None else below.shape[0]
    whole = packed[0][0].new_empty(sum(outputs) + rows, inputs + columns, dtype=dtype)
    # the same settings in forward and backward: each state of autograd and autocast would be one more compilation
    plain = torch.autocast(whole.device.type, enabled=False, cache_enabled=False)
    # again, since torch 2.13 keeps such settings by thread, and the backward runs in one of its own
    limits = torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS, fail_on_recompile_limit_hit=True)
    with torch.no_grad(), plain, limits:
        for layer, place in zip(packed, whole[: sum(outputs), :inputs].split(outputs), strict=True):
            pairs = place.view(_INTEGERS[dtype.itemsize][1])
            _compiled_dequantize([tensor.detach() for tensor in layer], blocks, pairs, dtype)
        if right is not None:
            whole[:, inputs:] = right
        if below is not None:
            whole[sum(outputs) :] = below
    return whole


@torch.library.custom_op("lora_lab::linear_4bit", mutates_args=())
def linear_4bit(x: Tensor, packed: list[Tensor], blocks: list[int], outputs: int) -> Tensor:  # noqa: ARG001  # its shape is told by it
    """Multiply x (..., inputs) with the transposed weight (outputs, inputs)."""
    return torch.nn.functional.linear(x, dequantized([packed], blocks, x.shape[-1], x.dtype))


@torch.library.custom_op("lora_lab::linear_4bit_backward", mutates_args=())
def linear_4bit_backward(grad_output: Tensor, packed: list[Tensor], blocks: list[int], inputs: int) -> Tensor:
    """Calculate the gradient of x: grad_output (..., outputs) times the weight."""
    return torch.matmul(grad_output, dequantized([packed], blocks, inputs, grad_output.dtype))


@linear_4bit.register_fake
def _(x: Tensor, packed: list[Tensor], blocks: list[int], outputs: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], outputs)


@linear_4bit_backward.register_fake
def _(grad_output: Tensor, packed: list[Tensor], blocks: list[int], inputs: int) -> Tensor:  # noqa: ARG001
    return grad_output.new_empty(*grad_output.shape[:-1], inputs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  # torch passes it by name
    x, packed, ctx.blocks, _ = inputs
    ctx.inputs = x.shape[-1]
    ctx.save_for_backward(*packed)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    packed = list(ctx.saved_tensors)
    return linear_4bit_backward(grad_output, packed, ctx.blocks, ctx.inputs), [None] * len(packed), None, None


linear_4bit.register_autograd(_backward, setup_context=_keep)


class DequantizingLinear4bit(Linear4bit):
    """bitsandbytes' layer; compiled, it dequantizes its weight in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        if not torch.compiler.is_compiling():
            return cast(Tensor, super().forward(x))
        product = linear_4bit(x.to(self.compute_dtype), *packed_weight(self), self.out_features)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return cast(Tensor, product.to(x.dtype))


def use_fused_dequantization(model: Any) -> None:
    """Switch the model's 4-bit layers to one kernel; their weights and everything else stay."""
    for module in model.modules():
        if has_whole_blocks(module):
            module.__class__ = DequantizingLinear4bit
