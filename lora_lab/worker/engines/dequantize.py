"""4-bit weights unpacked in one kernel, in place of bitsandbytes' three.

bitsandbytes unpacks a weight whose scales are quantised too in three launches (the scales, their offset, the weights),
in the forward and again in the backward. Written in torch's own operations, torch.compile makes one kernel of it. The
products are operations of their own to the layer's compilation: it would else keep the unpacked weight for the
backward, 16 bits a weight of the whole model.
"""

from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from lora_lab.worker.engines.compiled import MOST_COMPILATIONS


def has_whole_blocks(layer: Any) -> bool:
    """Whether it is a 4-bit layer of which no byte lies across rows, and whose last block is no shorter."""
    if not isinstance(layer, Linear4bit):
        return False
    outputs, inputs = layer.weight.quant_state.shape
    return bool(inputs % 2 == 0 and outputs * inputs % layer.weight.blocksize == 0)


def packed_weight(layer: Linear4bit) -> tuple[list[Tensor], list[int]]:
    """A layer's weight as `unpacked` takes it.

    Returns: bytes of two weights each, the first in the upper half; what each of the 16 values stands for; a scale for
    each block. Where scales are bytes too: what each of their 256 values stands for, a scale for each block of them,
    what they lie around. And the sizes of a block of weights and of a block of scales.
    """
    state = layer.weight.quant_state
    tensors = [layer.weight, state.code, state.absmax]
    if not state.nested:
        return tensors, [state.blocksize]
    return [*tensors, state.state2.code, state.state2.absmax, state.offset], [state.blocksize, state.state2.blocksize]


_INTEGERS = {2: (torch.int16, torch.int32), 4: (torch.int32, torch.int64)}
"""By the bytes of a number: integers of its size, and of two."""


def dequantize(packed: list[Tensor], blocks: list[int], pairs: Tensor, dtype: torch.dtype) -> None:
    """Write the weights: for every block its scale times what the values stand for. Two at a time, as one integer, so
    that a kernel looks up what is the same for both once, and once each of their bytes: that is what it waits for.

    Args:
        packed, blocks: as from `packed_weight`; or of many layers, what their scales lie around told for each block.
        pairs: the matrix (outputs, inputs / 2), two neighbours in a row in each number.
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
    beside: Tensor | None = None,
    below: Tensor | None = None,
) -> Tensor:
    """Layers' weights (outputs, inputs), one below the other, by one kernel each, and by one more what is to stand
    beside or below them.

    Args:
        packed, blocks: as from `packed_weight`, of each layer.
        beside: further columns, (outputs, an even number).
        below: further rows, (any, inputs).
    """
    outputs = [2 * layer[0].numel() // inputs for layer in packed]
    columns = 0 if beside is None else beside.shape[1]
    rows = 0 if below is None else below.shape[0]
    whole = packed[0][0].new_empty(sum(outputs) + rows, inputs + columns, dtype=dtype)
    # whatever forward and backward have autograd and autocast set to: each setting would be one more compilation
    plain = torch.autocast(whole.device.type, enabled=False, cache_enabled=False)
    # again, since torch 2.13 keeps such settings by thread, and the backward runs in one of its own
    limits = torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS, fail_on_recompile_limit_hit=True)
    with torch.no_grad(), plain, limits:
        for layer, place in zip(packed, whole[: sum(outputs), :inputs].split(outputs), strict=True):
            pairs = place.view(_INTEGERS[dtype.itemsize][1])
            _compiled_dequantize([tensor.detach() for tensor in layer], blocks, pairs, dtype)
        if beside is not None:
            whole[:, inputs:] = beside
        if below is not None:
            whole[sum(outputs) :] = below
    return whole


@torch.library.custom_op("lora_lab::linear_4bit", mutates_args=())
def linear_4bit(x: Tensor, packed: list[Tensor], blocks: list[int], outputs: int) -> Tensor:  # noqa: ARG001  # its shape is told by it
    """X (..., inputs) times the transposed weight (outputs, inputs)."""
    return torch.nn.functional.linear(x, dequantized([packed], blocks, x.shape[-1], x.dtype))


@torch.library.custom_op("lora_lab::linear_4bit_backward", mutates_args=())
def linear_4bit_backward(grad_output: Tensor, packed: list[Tensor], blocks: list[int], inputs: int) -> Tensor:
    """The gradient over x, from that over the result: slope (..., outputs) times the weight."""
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
    """bitsandbytes' layer, that unpacks its weight so where it is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if not torch.compiler.is_compiling():
            return cast(Tensor, super().forward(x))
        product = linear_4bit(x.to(self.compute_dtype), *packed_weight(self), self.out_features)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return cast(Tensor, product.to(x.dtype))


def use_fused_dequantization(model: Any) -> None:
    """Let the model's 4-bit layers be such layers; their weights and everything else stays."""
    for module in model.modules():
        if has_whole_blocks(module):
            module.__class__ = DequantizingLinear4bit
