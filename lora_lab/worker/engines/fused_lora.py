"""Layers and their adapters as few large products, in place of one for each factor and a sum.

PEFT calculates x W' + s (x A') B' (a dash: transposed) operation by operation. The product with B is as wide as the
layer's result, and is written and read once more for the sum, in the forward and in the backward. Two ways avoid
that, and round once or twice where PEFT rounds three times:

- wide: [x, s x A'] times [W, B]', where the result is wider than x and rows are many: x is copied, and the weight
  is copied or unpacked with B's columns beside it.
- onto: s x A' times B' first, onto which the large product adds while it is written.

The gradient over x is of the same form, with W and A in the places of W' and B'. Those over A and B are PEFT's own.

Layers that are given the same x are one layer to both: W and A are theirs one below the other, and B has theirs as
blocks on its diagonal, zeros elsewhere. With few columns these zeros cost next to nothing: a product so thin takes
about as long as it takes to read its other side.
"""

from typing import Any

import torch
from torch import Tensor

from lora_lab.worker.engines.dequantize import unpacked
from lora_lab.worker.engines.lora_grad import reads_once, thin_products

_FILLED = 2**23
"""Elements of a product's result from which it fills a large card by itself: two tiles of 128 x 256 for each of an
H100's 132 multiprocessors. Half of that was 0.2 ms of 17.4 slower at 512 rows, and about the same at 16384."""


@torch.library.custom_op("lora_lab::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor, a: Tensor, b: Tensor, scaling: float, weights: list[Tensor], blocks: list[int], parts: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The results of layers with their adapters', and what the backward needs again.

    Args:
        x: (..., inputs), in the format of `a` (ranks, inputs) and `b` (outputs, ranks), over all layers.
        weights, blocks: as from `packed_weight`, of all layers at once or of one after the other; one matrix
            (outputs, inputs) and no blocks where they are not packed.
        parts: each layer's own A (rank, inputs) and B (outputs, rank), over which there are gradients.

    Returns: (..., outputs) for each layer, or all of them side by side in one, see `is_apart`; scaling x A',
        (rows, ranks).
    """
    outputs, inputs = _outputs(parts), a.shape[1]
    rows = x.reshape(-1, inputs)
    narrow = _scaled(rows, a.t(), scaling)
    widths = outputs if is_apart(len(rows), outputs) else [sum(outputs)]
    results = []
    if widens(len(rows), inputs, sum(outputs), len(a)):
        given = torch.cat([rows, narrow], 1)
        matrix = _matrix(weights, blocks, inputs, x.dtype, beside=b)
        results = [given @ part.t() for part in matrix.split(widths)]
    else:
        matrix = _matrix(weights, blocks, inputs, x.dtype)
        for part, adapter in zip(matrix.split(widths), b.split(widths), strict=True):
            results.append((narrow @ adapter.t()).addmm_(rows, part.t()))
    # not `view`: of many results that are views, none may be changed in place
    return [torch.ops.aten._unsafe_view(result, [*x.shape[:-1], result.shape[1]]) for result in results], narrow


@torch.library.custom_op("lora_lab::adapted_linear_slope", mutates_args=())
def adapted_linear_slope(
    slopes: list[Tensor],
    x: Tensor,
    narrow: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    weights: list[Tensor],
    blocks: list[int],
    outputs: list[int],
    ranks: list[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients over x, `a` whole, and each layer's own B, from those over the results.

    Slopes that come apart are not joined: that is to copy them, and they are the largest there is. Onto the
    gradient over x, which is narrower, each adds its share.

    Args:
        slopes: (..., outputs), one or many, as the results were.
        outputs, ranks: of each layer.
    """
    inputs = a.shape[1]
    rows = x.reshape(-1, inputs)
    slopes = [slope.reshape(-1, slope.shape[-1]) for slope in slopes]
    widths = [slope.shape[1] for slope in slopes]
    if len(slopes) == len(outputs):
        own = zip(slopes, _diagonal(b, outputs, ranks), narrow.split(ranks, 1), strict=True)
        found = [_thin(*each, scaling) for each in own]
        backs, over_b = [back for back, _ in found], [over for _, over in found]
        back = backs[0] if len(backs) == 1 else torch.cat(backs, 1)
    else:
        parts = zip(slopes[0].split(outputs, 1), narrow.split(ranks, 1), strict=True)
        back, over_b = _scaled(slopes[0], b, scaling), [slope.t() @ part for slope, part in parts]
    if widens(len(rows), sum(outputs), inputs, len(a)):
        over_x = torch.cat([*slopes, back], 1) @ _matrix(weights, blocks, inputs, x.dtype, below=a)
    else:
        over_x = back @ a
        matrix = _matrix(weights, blocks, inputs, x.dtype)
        for slope, part in zip(slopes, matrix.split(widths), strict=True):
            over_x.addmm_(slope, part)
    return over_x.view_as(x), back.t() @ rows, over_b


def _thin(slope: Tensor, b: Tensor, narrow: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """What of one layer's gradient (rows, outputs) goes on to its A, (rows, rank), and that over its B."""
    once = reads_once(len(slope), slope.shape[1], b.shape[1], slope.dtype, slope.device)
    if once and slope.is_contiguous():
        return thin_products(slope, b.contiguous(), narrow.contiguous(), scaling)
    return _scaled(slope, b, scaling), slope.t() @ narrow


def _diagonal(b: Tensor, outputs: list[int], ranks: list[int]) -> list[Tensor]:
    """Each layer's own B (outputs, rank), out of blocks on a diagonal."""
    return [rows.split(ranks, 1)[number] for number, rows in enumerate(b.split(outputs))]


def widens(rows: int, given: int, wanted: int, rank: int) -> bool:
    """Whether it costs less to copy what goes into a product, and the weight, than to go over the result once more.

    A weight that is unpacked for the product is not copied, but to leave room in each of its rows costs about as much:
    on an H100 10 microseconds in place of 8, averaged over all weights of a model, and a launch for what goes there.

    Args:
        given, wanted: columns of what goes in, and of the result.
        rank: columns that would be added; where rows then no longer begin at multiples of 16 bytes, the fastest kernels
            can't be had for the whole product, and of an odd number `unpacked` can't leave room for them.
    """
    return rank % 8 == 0 and rows * wanted > rows * given + given * wanted


def is_apart(rows: int, outputs: list[int]) -> bool:
    """Whether layers' results are tensors of their own, each by a product of its own, in place of one for all.

    One product saves launches, and fills a card that the narrowest would leave half empty. But who keeps a part of its
    result for the backward keeps all of it (v of q, k and v), and slopes have to be joined for the way back, which
    goes over them once more. That weighs more, the more rows there are.
    """
    return len(outputs) > 1 and rows * min(outputs) >= _FILLED


def _outputs(parts: list[Tensor]) -> list[int]:
    return [b.shape[0] for b in parts[1::2]]


def _scaled(one: Tensor, other: Tensor, factor: float) -> Tensor:
    """A product, multiplied before it is rounded."""
    return torch.addmm(one.new_empty(one.shape[0], other.shape[1]), one, other, beta=0, alpha=factor)


def _matrix(
    weights: list[Tensor],
    blocks: list[int],
    inputs: int,
    dtype: torch.dtype,
    beside: Tensor | None = None,
    below: Tensor | None = None,
) -> Tensor:
    if blocks:
        each = 3 * len(blocks)  # tensors of one layer, see `packed_weight`
        packed = [weights[first : first + each] for first in range(0, len(weights), each)]
        return unpacked(packed, blocks, inputs, dtype, beside, below)
    if beside is not None:
        return torch.cat([weights[0], beside], 1)
    return weights[0] if below is None else torch.cat([weights[0], below], 0)


@adapted_linear.register_fake
def _(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,  # noqa: ARG001
    weights: list[Tensor],  # noqa: ARG001
    blocks: list[int],  # noqa: ARG001
    parts: list[Tensor],
) -> tuple[list[Tensor], Tensor]:
    rows, outputs = x[..., 0].numel(), _outputs(parts)
    widths = outputs if is_apart(rows, outputs) else [b.shape[0]]
    return [x.new_empty(*x.shape[:-1], width) for width in widths], x.new_empty(rows, a.shape[0])


@adapted_linear_slope.register_fake
def _(
    slopes: list[Tensor],  # noqa: ARG001
    x: Tensor,
    narrow: Tensor,  # noqa: ARG001
    a: Tensor,
    b: Tensor,
    scaling: float,  # noqa: ARG001
    weights: list[Tensor],  # noqa: ARG001
    blocks: list[int],  # noqa: ARG001
    outputs: list[int],
    ranks: list[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    over_b = [b.new_empty(wide, rank) for wide, rank in zip(outputs, ranks, strict=True)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(a), over_b


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, a, b, ctx.scaling, weights, ctx.blocks, parts = inputs
    ctx.outputs, ctx.ranks = _outputs(parts), [part.shape[0] for part in parts[::2]]
    ctx.save_for_backward(x, output[1], a, b, *weights)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, slopes: list[Tensor], _: Tensor) -> tuple[Any, ...]:
    x, narrow, a, b, *weights = ctx.saved_tensors
    over_x, over_a, over_b = adapted_linear_slope(
        slopes, x, narrow, a, b, ctx.scaling, weights, ctx.blocks, ctx.outputs, ctx.ranks
    )
    over_parts = [part for pair in zip(over_a.split(ctx.ranks), over_b, strict=True) for part in pair]
    # torch wants the structure of what was given, and takes an empty list for one of tensors
    return over_x, None, None, None, [None] * len(weights), None if ctx.blocks else [], over_parts


adapted_linear.register_autograd(_backward, setup_context=_keep)
