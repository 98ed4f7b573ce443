"""Train PEFT's LoRA layers by `lora_linear`. Layers with the same input (q, k, v) share one call."""

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
from lora_lab.worker.engines.stacked_weights import move, weights_of

_MOST_RANKS = 128
"""Of the layers in a group together: a product with that many columns takes about as long as one with fewer (estimated;
48 were measured)."""


class _FusedLora:
    """Calls `lora_linear` in training; everything else stays PEFT's.

    The first layer of a group calculates for all layers of it and hands each of the others its output, together with
    the x it belongs to. A layer that gets another x calculates for itself. An output that was handed over is taken and
    dropped at the next call. `group_by_input` keeps layers apart where the model changes x in place between them, if it
    does so in evaluation too.
    """

    compute_a: Tensor
    compute_b: Tensor
    """The adapter in the compute dtype."""
    others: list[Any]
    """In the first layer of a group the rest of it; empty in the others."""
    stacked_a: Tensor
    stacked_b: Tensor
    """The adapters of this layer and `others`."""
    weights: list[Tensor]
    blocks: list[int]
    """Their weights, as from `weights_of`."""
    handed: tuple[Tensor, Tensor] | None
    """x and this layer's output, from the call of the group's first layer to its own."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
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
    """PEFT's LoRA around a plain linear layer."""


class FusedLoraLinear4bit(_FusedLora, PeftLinear4bit):
    """PEFT's LoRA around a 4-bit linear layer."""


def _results(layers: list[Any], x: Tensor) -> list[Tensor]:
    """Map (..., inputs) to (..., outputs) of each layer; the first holds the stacked adapters of all."""
    first = layers[0]
    parts = [part for layer in layers for part in (layer.compute_a, layer.compute_b)]
    compute_x = x.to(first.compute_a.dtype)
    a, b, scaling = first.stacked_a, first.stacked_b, _scaling(first)
    results = lora_linear(compute_x, a, b, scaling, first.weights, first.blocks, parts)
    if len(results) < len(layers):
        results = _split(results[0], [layer.compute_b.shape[0] for layer in layers])
    return [_finished(layer, result, x) for layer, result in zip(layers, results, strict=True)]


def _finished(layer: Any, result: Tensor, x: Tensor) -> Tensor:
    base = layer.base_layer
    if base.bias is not None:
        result = result + base.bias.to(result.dtype)
    return result.to(x.dtype) if layer.blocks else result  # as bitsandbytes and torch do


def _split(together: Tensor, outputs: list[int]) -> list[Tensor]:
    """Split outputs that lie side by side. All but the widest are copied: one that is kept for the backward (v of q, k
    and v) would keep all. Two of one width (gate and up) are kept anyway, and are not copied.

    `split` is not used: its parts may not be changed in place. Parts that are not copied have gaps between their rows.
    """
    parts = torch.unsafe_split_with_sizes(together, outputs, -1)
    if len(outputs) == 2 and outputs[0] == outputs[1]:
        return list(parts)
    widest = outputs.index(max(outputs))
    return [part if number == widest else part.contiguous() for number, part in enumerate(parts)]


def use_fused_lora(model: Any, dtype: torch.dtype) -> ComputeCopies:
    """Switch the model's LoRA layers to the fused product in training, on copies of their adapters in `dtype`.

    Layers with dropout before the adapter, or with a variant of LoRA, stay as they are.

    Returns: the copy of each adapter matrix.
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
    stacks: dict[int, tuple[Tensor, Tensor]] = {}
    for like in alike.values():
        made = copies.add([[_pair(layer) for layer in group] for group in like], dtype)
        stacks |= {id(group[0]): pair for group, pair in zip(like, made, strict=True)}
    # decoder layer by decoder layer: what one of them leaves is as large as what the next one takes
    place = {id(module): number for number, module in enumerate(model.modules())}
    for group in sorted(groups, key=lambda group: place[id(group[0])]):
        _adapt(group, *stacks[id(group[0])], copies)
    # outputs are handed over as an attribute: compiled code keeps nothing of that for checkpointing to repeat
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    torch.cuda.empty_cache()  # where the first decoder layer's weights lay before
    return copies


def _adapt(group: list[Any], a: Tensor, b: Tensor, copies: ComputeCopies) -> None:
    """Change the class of the layers. Each gets what it needs by itself, and the first what all of them need."""
    if len(group) == 1:
        move(group[0].base_layer)
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
    """Keep the layers together where one call can serve all of them, else separate them."""
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
    """Return the one adapter's A (rank, inputs) and B (outputs, rank)."""
    [adapter] = layer.active_adapters
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _scaling(layer: Any) -> float:
    [adapter] = layer.active_adapters
    return float(layer.scaling[adapter])


def _is_plain(module: Any, dtype: torch.dtype) -> bool:
    """Return True for a layer that is the sum of a frozen product and one plain adapter's, and nothing more."""
    if type(module) not in (PeftLinear, PeftLinear4bit) or module.merged or len(module.active_adapters) != 1:
        return False
    [adapter] = module.active_adapters
    if adapter not in module.lora_A or adapter in module.lora_variant or module.lora_B[adapter].bias is not None:
        return False
    base, (a, b) = module.base_layer, _pair(module)
    known = has_whole_blocks(base) or (type(base) is nn.Linear and base.weight.dtype is dtype)
    trained = a.requires_grad and b.requires_grad and not base.weight.requires_grad
    return known and trained and isinstance(module.lora_dropout[adapter], nn.Identity) and not module.fan_in_fan_out
