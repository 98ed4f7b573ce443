"""PEFT's layers, that train by `adapted_linear`: those that are given the same tensor by one call of it."""

from collections import defaultdict
from typing import Any, cast

import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from lora_lab.worker.engines.compute_copies import ComputeCopies
from lora_lab.worker.engines.dequantize import has_whole_blocks, packed_weight
from lora_lab.worker.engines.fused_lora import lora_linear
from lora_lab.worker.engines.input_groups import group_by_input
from lora_lab.worker.engines.stacked_weights import weights_of

_MOST_RANKS = 128
"""Of the layers in a group: a product with that many columns takes about as long as one with fewer (reckoned; 48 were
measured)."""


class _FusedLora:
    """What both of PEFT's layers do in training by `adapted_linear`; all else they do as ever.

    The first layer of a group calculates for all of it and hands each other its result, together with the x it is of.
    Who is given another x calculates by itself. What was handed over is taken at once, so that nothing stays. A model
    that changes x in place between two of them is found out before, if it does so in evaluation too.
    """

    compute_a: Tensor
    compute_b: Tensor
    """The adapter in the format of the product."""
    others: list[Any]
    """The rest of the group, of its first layer; empty in the others."""
    stacked_a: Tensor
    stacked_b: Tensor
    """The adapters of the layer and the others."""
    weights: list[Tensor]
    blocks: list[int]
    """Their weights, as from `weights_of`."""
    handed: tuple[Tensor, Tensor] | None
    """x and the result, from the call of the first layer to that of this one."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        handed, self.handed = self.handed, None
        if not (self.training and torch.is_grad_enabled()) or self.merged or self.disable_adapters:
            return cast(Tensor, super().forward(x, *args, **kwargs))  # type: ignore[misc]
        if handed is not None and handed[0] is x:
            return cast(Tensor, handed[1])
        first, *rest = _results([self, *self.others], x)
        for other, result in zip(self.others, rest, strict=True):
            other.handed = (x, result)
        return first


class FusedLoraLinear(_FusedLora, PeftLinear):
    """PEFT's, over a plain layer."""


class FusedLoraLinear4bit(_FusedLora, PeftLinear4bit):
    """PEFT's, over one in 4 bits."""


def _results(layers: list[Any], x: Tensor) -> list[Tensor]:
    """(..., inputs) to (..., outputs) of each layer, the first of which has the others' stacked."""
    first = layers[0]
    parts = [part for layer in layers for part in (layer.compute_a, layer.compute_b)]
    compute_x = x.to(first.compute_a.dtype)
    a, b, scaling = first.stacked_a, first.stacked_b, _scaling(first)
    results = lora_linear(compute_x, a, b, scaling, first.weights, first.blocks, parts)[0]
    if len(results) < len(layers):
        results = _split(results[0], [layer.compute_b.shape[0] for layer in layers])
    return [_finished(layer, result, x) for layer, result in zip(layers, results, strict=True)]


def _finished(layer: Any, result: Tensor, x: Tensor) -> Tensor:
    base = layer.base_layer
    if base.bias is not None:
        result = result + base.bias.to(result.dtype)
    return result.to(x.dtype) if layer.blocks else result  # as bitsandbytes and torch have it


def _split(together: Tensor, outputs: list[int]) -> list[Tensor]:
    """Results that lie side by side, each for itself. All but the widest are copied: where one of them is kept for the
    backward (v of q, k and v), it would keep all. Not so two of one width (gate and up), which are kept anyway.

    Not by `split`, whose parts may not be changed in place. Who is not copied has gaps between its rows.
    """
    parts = torch.unsafe_split_with_sizes(together, outputs, -1)
    if len(outputs) == 2 and outputs[0] == outputs[1]:
        return list(parts)
    widest = outputs.index(max(outputs))
    return [part if number == widest else part.contiguous() for number, part in enumerate(parts)]


def use_fused_lora(model: Any, dtype: torch.dtype) -> ComputeCopies:
    """Let adapted layers calculate so in training, over copies of their adapters in `dtype`.

    Layers with dropout before the adapter, or another adapter than a plain one, stay as they are.

    Returns: for each adapter's matrix its copy.
    """
    groups = [
        part
        for group in group_by_input(model, [m for m in model.modules() if _is_plain(m, dtype)], dtype)
        for part in _as_one(group)
    ]
    alike: defaultdict[Any, list[list[Any]]] = defaultdict(list)
    for group in groups:
        alike[tuple((_pair(layer)[0].shape, _pair(layer)[1].shape) for layer in group)].append(group)
    copies = ComputeCopies()
    for like in alike.values():
        stacks = copies.add([[_pair(layer) for layer in group] for group in like], dtype)
        for group, (a, b) in zip(like, stacks, strict=True):
            _adapt(group, a, b, copies)
    # results are handed over: in compiled code nothing is left of that which checkpointing would do twice
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    torch.cuda.empty_cache()  # where weights lay before, in pieces too small for those that lie together
    return copies


def _adapt(group: list[Any], a: Tensor, b: Tensor, copies: ComputeCopies) -> None:
    """Let layers be ours. Each gets what it needs by itself, and the first what all need."""
    together = weights_of(group)
    for layer in group:
        layer.compute_a, layer.compute_b = (copies[part] for part in _pair(layer))
        layer.stacked_a, layer.stacked_b = layer.compute_a.data, layer.compute_b.data
        layer.weights, layer.blocks = weights_of([layer])
        layer.others, layer.handed = [], None
        layer.__class__ = FusedLoraLinear4bit if type(layer) is PeftLinear4bit else FusedLoraLinear
    first, *others = group
    first.others, first.stacked_a, first.stacked_b, (first.weights, first.blocks) = others, a, b, together


def _as_one(group: list[Any]) -> list[list[Any]]:
    """The layers together if one call can be of all of them, else each by itself."""
    kinds = {
        (
            type(layer),
            _scaling(layer),
            layer.base_layer.weight.device,
            tuple(packed_weight(layer.base_layer)[1]) if has_whole_blocks(layer.base_layer) else None,
        )
        for layer in group
    }
    ranks = sum(len(_pair(layer)[0]) for layer in group)
    return [group] if len(kinds) == 1 and ranks <= _MOST_RANKS else [[layer] for layer in group]


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    """The one adapter's A (rank, inputs) and B (outputs, rank)."""
    [adapter] = layer.active_adapters
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _scaling(layer: Any) -> float:
    [adapter] = layer.active_adapters
    return float(layer.scaling[adapter])


def _is_plain(module: Any, dtype: torch.dtype) -> bool:
    """Whether a layer is PEFT's sum of a frozen product and one adapter's, and no more."""
    if type(module) not in (PeftLinear, PeftLinear4bit) or module.merged or len(module.active_adapters) != 1:
        return False
    [adapter] = module.active_adapters
    if adapter not in module.lora_A or adapter in module.lora_variant or module.lora_B[adapter].bias is not None:
        return False
    base, (a, b) = module.base_layer, _pair(module)
    known = has_whole_blocks(base) or (type(base) is nn.Linear and base.weight.dtype is dtype)
    trained = a.requires_grad and b.requires_grad and not base.weight.requires_grad
    return known and trained and isinstance(module.lora_dropout[adapter], nn.Identity) and not module.fan_in_fan_out
