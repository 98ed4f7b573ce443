"""Calculate a linear layer and its LoRA adapter in one or two large matrix products.

PEFT calculates x W' + s (x A') B' (a dash means transposed) operation by operation. The product with B is as wide as
the layer's output, and is written and read once more for the sum, in the forward and in the backward. Two ways avoid
that, and round once or twice where PEFT rounds three times:

- wide: [x, s x A'] times [W, B]', where the output is wider than x and there are many rows: x is copied, and the
  weight is copied or dequantized with B's columns next to it.
- onto: s x A' times B' first, and the large product is accumulated onto it.

The gradient of x has the same form, with W and A for W' and B'. The gradients of A and B are calculated as PEFT does.

Layers with the same input are one layer to both ways: their W and A are stacked, and B is block-diagonal with theirs.
The zeros cost next to nothing: a product with few columns takes about as long as reading its other side.
"""

from typing import Any

import torch
from torch import Tensor

from lora_lab.worker.engines.dequantize import dequantized
from lora_lab.worker.engines.lora_grad import lora_gradients, reads_once

_FILLED = 2**23
"""A product with this many output elements fills a large card by itself: two tiles of 128 x 256 for each of an H100's
132 multiprocessors. Half of that was 0.2 ms of 17.4 slower at 512 rows, and about the same at 16384."""


def lora_linear(
    x: Tensor, a: Tensor, b: Tensor, scaling: float, weights: list[Tensor], blocks: list[int], parts: list[Tensor]
) -> list[Tensor]:
    """Calculate the outputs of layers with their adapters.

    The small product is an operation of its own, because the backward needs it again. Where a layer is calculated once
    more for its backward, torch.compile leaves out what the backward does not need: the large product of a layer's last
    projection, which was 9 % of all of Llama-3.1-8B's matrix work.

    Args:
        x: (..., inputs), in the format of `a` (ranks, inputs) and `b` (outputs, ranks), over all layers.
        weights, blocks: as from `packed_weight`, of all layers at once or of one after the other; one matrix
            (outputs, inputs) and no blocks for weights that are not in 4 bit.
        parts: each layer's own A (rank, inputs) and B (outputs, rank), which get the gradients.

    Returns: (..., outputs) for each layer, or all of them side by side in one, see `is_apart`.
    """
    hidden = lora_hidden(x.detach(), a.detach(), scaling)  # its gradient is part of `onto_lora`'s
    results: list[Tensor] = onto_lora(x, hidden, a, b, scaling, weights, blocks, parts)
    return results


@torch.library.custom_op("lora_lab::lora_hidden", mutates_args=())
def lora_hidden(x: Tensor, a: Tensor, scaling: float) -> Tensor:
    """Return scaling x A', (rows, ranks)."""
    return _scaled(x.reshape(-1, a.shape[1]), a.t(), scaling)


@torch.library.custom_op("lora_lab::onto_lora", mutates_args=())
def onto_lora(
    x: Tensor,
    hidden: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,  # noqa: ARG001
    weights: list[Tensor],
    blocks: list[int],
    parts: list[Tensor],
) -> list[Tensor]:
    """Calculate what `lora_linear` returns, from `lora_hidden`."""
    outputs, inputs = _outputs(parts), a.shape[1]
    rows = x.reshape(-1, inputs)
    widths = outputs if is_apart(len(rows), outputs) else [sum(outputs)]
    results = []
    if widens(len(rows), inputs, sum(outputs), len(a)):
        widened = torch.cat([rows, hidden], 1)
        matrix = _matrix(weights, blocks, inputs, x.dtype, right=b)
        results = [widened @ part.t() for part in matrix.split(widths)]
    else:
        matrix = _matrix(weights, blocks, inputs, x.dtype)
        for part, adapter in zip(matrix.split(widths), b.split(widths), strict=True):
            results.append((hidden @ adapter.t()).addmm_(rows, part.t()))
    # not `view`: autograd forbids in-place changes of an output that is one of several views
    return [torch.ops.aten._unsafe_view(result, [*x.shape[:-1], result.shape[1]]) for result in results]


@torch.library.custom_op("lora_lab::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    grad_outputs: list[Tensor],
    x: Tensor,
    hidden: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    weights: list[Tensor],
    blocks: list[int],
    outputs: list[int],
    ranks: list[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Calculate the gradients of x, of `a` whole, and of each layer's own B.

    Separate output gradients are not joined. They are the largest tensors here, and joining copies them. Each adds its
    share to the gradient of x, which is narrower.

    Args:
        grad_outputs: (..., outputs), one tensor or one for each layer, as the outputs were.
        hidden: scaling x A', from the forward.
        outputs, ranks: of each layer.
    """
    inputs = a.shape[1]
    rows = x.reshape(-1, inputs)
    grad_outputs = [grad_output.reshape(-1, grad_output.shape[-1]) for grad_output in grad_outputs]
    widths = [grad_output.shape[1] for grad_output in grad_outputs]
    if len(grad_outputs) == len(outputs):
        own = zip(grad_outputs, _diagonal(b, outputs, ranks), hidden.split(ranks, 1), strict=True)
        found = [_lora_gradients(*each, scaling) for each in own]
        grad_hiddens, grad_b = [grad_hidden for grad_hidden, _ in found], [grad for _, grad in found]
        grad_hidden = grad_hiddens[0] if len(grad_hiddens) == 1 else torch.cat(grad_hiddens, 1)
    else:
        parts = zip(grad_outputs[0].split(outputs, 1), hidden.split(ranks, 1), strict=True)
        grad_hidden = _scaled(grad_outputs[0], b, scaling)
        grad_b = [grad_output.t() @ part for grad_output, part in parts]
    if widens(len(rows), sum(outputs), inputs, len(a)):
        grad_x = torch.cat([*grad_outputs, grad_hidden], 1) @ _matrix(weights, blocks, inputs, x.dtype, below=a)
    else:
        grad_x = grad_hidden @ a
        matrix = _matrix(weights, blocks, inputs, x.dtype)
        for grad_output, part in zip(grad_outputs, matrix.split(widths), strict=True):
            grad_x.addmm_(grad_output, part)
    return grad_x.view_as(x), grad_hidden.t() @ rows, grad_b


def _lora_gradients(grad_output: Tensor, b: Tensor, hidden: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Calculate one layer's gradient of x A', (rows, rank), and that of its B."""
    once = reads_once(len(grad_output), grad_output.shape[1], b.shape[1], grad_output.dtype, grad_output.device)
    if once and grad_output.is_contiguous():
        return lora_gradients(grad_output, b.contiguous(), hidden.contiguous(), scaling)
    return _scaled(grad_output, b, scaling), grad_output.t() @ hidden


def _diagonal(b: Tensor, outputs: list[int], ranks: list[int]) -> list[Tensor]:
    """Split a block-diagonal matrix into each layer's own B (outputs, rank)."""
    return [rows.split(ranks, 1)[number] for number, rows in enumerate(b.split(outputs))]


def widens(rows: int, inputs: int, outputs: int, rank: int) -> bool:
    """Return True where copying the input and the weight costs less than a second pass over the output.

    A 4-bit weight is not copied. But leaving room in each row while it is dequantized costs about as much: on an H100
    10 microseconds instead of 8, averaged over all weights of a model, and a launch to fill the room.

    Args:
        inputs, outputs: columns of the product's input and output.
        rank: columns to add. If rows then no longer start at multiples of 16 bytes, the fastest kernels do not take the
            product; and `dequantized` can't leave room for an odd number.
    """
    return rank % 8 == 0 and rows * outputs > rows * inputs + inputs * outputs


def is_apart(rows: int, outputs: list[int]) -> bool:
    """Return True where each layer gets a product and an output tensor of its own, instead of one for all.

    One product saves launches, and fills a card that the narrowest layer would leave half empty. But keeping a part of
    its output for the backward keeps all of it (v of q, k and v), and the backward has to join the output gradients,
    one more pass over them. That weighs more, the more rows there are.
    """
    return len(outputs) > 1 and rows * min(outputs) >= _FILLED


def _outputs(parts: list[Tensor]) -> list[int]:
    return [b.shape[0] for b in parts[1::2]]


def _scaled(one: Tensor, other: Tensor, factor: float) -> Tensor:
    """Return factor times the product, scaled before it is rounded."""
    return torch.addmm(one.new_empty(one.shape[0], other.shape[1]), one, other, beta=0, alpha=factor)


def _matrix(
    weights: list[Tensor],
    blocks: list[int],
    inputs: int,
    dtype: torch.dtype,
    right: Tensor | None = None,
    below: Tensor | None = None,
) -> Tensor:
    if blocks:
        each = 3 * len(blocks)  # tensors of one layer, see `packed_weight`
        packed = [weights[first : first + each] for first in range(0, len(weights), each)]
        return dequantized(packed, blocks, inputs, dtype, right, below)
    if right is not None:
        return torch.cat([weights[0], right], 1)
    return weights[0] if below is None else torch.cat([weights[0], below], 0)


@lora_hidden.register_fake
def _(x: Tensor, a: Tensor, scaling: float) -> Tensor:  # noqa: ARG001
    return x.new_empty(x[..., 0].numel(), a.shape[0])


@onto_lora.register_fake
def _(
    x: Tensor,
    hidden: Tensor,
    a: Tensor,  # noqa: ARG001
    b: Tensor,
    scaling: float,  # noqa: ARG001
    weights: list[Tensor],  # noqa: ARG001
    blocks: list[int],  # noqa: ARG001
    parts: list[Tensor],
) -> list[Tensor]:
    outputs = _outputs(parts)
    widths = outputs if is_apart(len(hidden), outputs) else [b.shape[0]]
    return [x.new_empty(*x.shape[:-1], width) for width in widths]


@lora_linear_backward.register_fake
def _(
    grad_outputs: list[Tensor],  # noqa: ARG001
    x: Tensor,
    hidden: Tensor,  # noqa: ARG001
    a: Tensor,
    b: Tensor,
    scaling: float,  # noqa: ARG001
    weights: list[Tensor],  # noqa: ARG001
    blocks: list[int],  # noqa: ARG001
    outputs: list[int],
    ranks: list[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grad_b = [b.new_empty(wide, rank) for wide, rank in zip(outputs, ranks, strict=True)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(a), grad_b


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    x, hidden, a, b, ctx.scaling, weights, ctx.blocks, parts = inputs
    ctx.outputs, ctx.ranks = _outputs(parts), [part.shape[0] for part in parts[::2]]
    ctx.save_for_backward(x, hidden, a, b, *weights)


def _backward(ctx: Any, grad_outputs: list[Tensor]) -> tuple[Any, ...]:
    x, hidden, a, b, *weights = ctx.saved_tensors
    grad_x, grad_a, grad_b = lora_linear_backward(
        grad_outputs, x, hidden, a, b, ctx.scaling, weights, ctx.blocks, ctx.outputs, ctx.ranks
    )
    grad_parts = [part for pair in zip(grad_a.split(ctx.ranks), grad_b, strict=True) for part in pair]
    # torch wants the structure of the inputs, and takes an empty list for a list of tensors
    return grad_x, None, None, None, None, [None] * len(weights), None if ctx.blocks else [], grad_parts


onto_lora.register_autograd(_backward, setup_context=_keep)
