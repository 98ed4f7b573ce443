"""A layer and its adapter as few large products, in place of one for each factor and a sum.

PEFT calculates x W' + s (x A') B' (a dash: transposed) operation by operation. The product with B is as wide as the
layer's result, and is written and read once more for the sum, in the forward and in the backward. Two ways avoid
that, and round once or twice where PEFT rounds three times:

- wide: [x, s x A'] times [W, B]', where the result is wider than x and rows are many: x is copied, and the weight
  is copied or unpacked with B's columns beside it.
- onto: s x A' times B' first, onto which the large product adds while it is written.

The gradient over x is of the same form, with W and A in the places of W' and B'. Those over A and B are PEFT's own.
"""

from typing import Any, cast

import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from lora_lab.worker.engines.unpacking import has_whole_blocks, packed_weight, unpacked


@torch.library.custom_op("lora_lab::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor, a: Tensor, b: Tensor, scaling: float, weight: list[Tensor], blocks: list[int]
) -> tuple[Tensor, Tensor]:
    """A layer's result with its adapter's, and what the backward needs again.

    Args:
        x: (..., inputs), in the format of `a` (rank, inputs) and `b` (outputs, rank).
        weight, blocks: as from `packed_weight`; the matrix (outputs, inputs) and no blocks where it is not packed.

    Returns: (..., outputs); scaling x A', (rows, rank).
    """
    outputs, inputs = b.shape[0], a.shape[1]
    rows = x.reshape(-1, inputs)
    narrow = _scaled(rows, a.t(), scaling)
    if widens(len(rows), inputs, outputs, len(a)):
        result = torch.cat([rows, narrow], 1) @ _matrix(weight, blocks, inputs, x.dtype, beside=b).t()
    else:
        result = narrow @ b.t()
        result.addmm_(rows, _matrix(weight, blocks, inputs, x.dtype).t())
    return result.view(*x.shape[:-1], outputs), narrow


@torch.library.custom_op("lora_lab::adapted_linear_slope", mutates_args=())
def adapted_linear_slope(
    slope: Tensor,
    x: Tensor,
    narrow: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    weight: list[Tensor],
    blocks: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients over x, a and b, from that over the result: slope (..., outputs)."""
    outputs, inputs = b.shape[0], a.shape[1]
    rows, slopes = x.reshape(-1, inputs), slope.reshape(-1, outputs)
    back = _scaled(slopes, b, scaling)
    if widens(len(rows), outputs, inputs, len(a)):
        over_x = torch.cat([slopes, back], 1) @ _matrix(weight, blocks, inputs, x.dtype, below=a)
    else:
        over_x = back @ a
        over_x.addmm_(slopes, _matrix(weight, blocks, inputs, x.dtype))
    return over_x.view_as(x), back.t() @ rows, slopes.t() @ narrow


def widens(rows: int, given: int, wanted: int, rank: int) -> bool:
    """Whether it costs less to copy what goes into a product, and the weight, than to go over the result once more.

    A weight that is unpacked for the product is not copied, but to leave room in each of its rows costs about as much:
    on an H100 10 microseconds in place of 8, averaged over all weights of a model, and a launch for what goes there.

    Args:
        given, wanted: columns of what goes in, and of the result.
        rank: columns that would be added; where rows then no longer begin at multiples of 16 bytes, the fastest kernels
            can't be had for the whole product.
    """
    return rank % 8 == 0 and rows * wanted > rows * given + given * wanted


def _scaled(one: Tensor, other: Tensor, factor: float) -> Tensor:
    """A product, multiplied before it is rounded."""
    return torch.addmm(one.new_empty(one.shape[0], other.shape[1]), one, other, beta=0, alpha=factor)


def _matrix(
    weight: list[Tensor],
    blocks: list[int],
    inputs: int,
    dtype: torch.dtype,
    beside: Tensor | None = None,
    below: Tensor | None = None,
) -> Tensor:
    if blocks:
        return unpacked(weight, blocks, inputs, dtype, beside, below)
    if beside is not None:
        return torch.cat([weight[0], beside], 1)
    return weight[0] if below is None else torch.cat([weight[0], below], 0)


@adapted_linear.register_fake
def _(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,  # noqa: ARG001
    weight: list[Tensor],  # noqa: ARG001
    blocks: list[int],  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(x[..., 0].numel(), a.shape[0])


@adapted_linear_slope.register_fake
def _(slope: Tensor, x: Tensor, narrow: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, a, b, ctx.scaling, weight, ctx.blocks = inputs
    ctx.save_for_backward(x, output[1], a, b, *weight)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, narrow, a, b, *weight = ctx.saved_tensors
    over_x, over_a, over_b = adapted_linear_slope(slope, x, narrow, a, b, ctx.scaling, weight, ctx.blocks)
    # torch wants the structure of what was given, and takes an empty list for one of tensors
    return over_x, over_a, over_b, None, [None] * len(weight), None if ctx.blocks else []


adapted_linear.register_autograd(_backward, setup_context=_keep)


class _Adapted:
    """What both of PEFT's layers do in training by `adapted_linear`; all else they do as ever. A training step that
    does not bring the copies up to date trains by old ones."""

    working_a: Tensor
    working_b: Tensor
    """The adapter in the format of the product."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if not (self.training and torch.is_grad_enabled()) or self.merged or self.disable_adapters:
            return cast(Tensor, super().forward(x, *args, **kwargs))  # type: ignore[misc]
        base = self.base_layer
        weight, blocks = _weight_of(base)
        [adapter] = self.active_adapters
        a, b = self.working_a, self.working_b
        result: Tensor = adapted_linear(x.to(a.dtype), a, b, float(self.scaling[adapter]), weight, blocks)[0]
        if base.bias is not None:
            result = result + base.bias.to(result.dtype)
        return result.to(x.dtype) if blocks else result  # as bitsandbytes and torch have it


class AdaptedLinear(_Adapted, PeftLinear):
    """PEFT's, over a plain layer."""


class AdaptedLinear4bit(_Adapted, PeftLinear4bit):
    """PEFT's, over one in 4 bits."""


def _weight_of(base: Any) -> tuple[list[Tensor], list[int]]:
    return packed_weight(base) if hasattr(base.weight, "quant_state") else ([base.weight], [])


def use_adapted_products(model: Any, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Let adapted layers calculate so in training, over copies of their adapters in `dtype`: autocast would convert
    each in each step by itself. Whoever trains has to bring the copies up to date, and takes gradients over them.

    Layers with dropout before the adapter, or another adapter than a plain one, stay as they are.

    Returns: for each adapter's matrix its copy.
    """
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        if not _is_plain(module, dtype):
            continue
        [adapter] = module.active_adapters
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        module.working_a, module.working_b = (p.detach().to(dtype, copy=True).requires_grad_() for p in (a, b))
        copies[a], copies[b] = module.working_a, module.working_b
        module.__class__ = AdaptedLinear4bit if type(module) is PeftLinear4bit else AdaptedLinear
    return copies


def _is_plain(module: Any, dtype: torch.dtype) -> bool:
    """Whether a layer is PEFT's sum of a frozen product and one adapter's, and no more."""
    if type(module) not in (PeftLinear, PeftLinear4bit) or module.merged or len(module.active_adapters) != 1:
        return False
    [adapter] = module.active_adapters
    if adapter not in module.lora_A or adapter in module.lora_variant or module.lora_B[adapter].bias is not None:
        return False
    base, a, b = module.base_layer, module.lora_A[adapter].weight, module.lora_B[adapter].weight
    known = has_whole_blocks(base) or (type(base) is nn.Linear and base.weight.dtype is dtype)
    trained = a.requires_grad and b.requires_grad and not base.weight.requires_grad
    return known and trained and isinstance(module.lora_dropout[adapter], nn.Identity) and not module.fan_in_fan_out
