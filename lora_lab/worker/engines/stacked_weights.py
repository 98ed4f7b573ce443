"""Stack the frozen weights of layers that are calculated as one, so that one kernel reads them."""

from typing import Any

import torch
from torch import Tensor

from lora_lab.worker.engines.dequantize import has_whole_blocks, packed_weight
from lora_lab.worker.host_memory import is_in_host_memory, joined


def weights_of(layers: list[Any]) -> tuple[list[Tensor], list[int]]:
    """Return the weights of `layers` (outputs, inputs) as `lora_linear` takes them. Each layer's weight becomes a view
    of the stack, so that nothing is held twice. Call it again after a layer got another weight.

    Args:
        layers: PEFT's, around linear layers that differ in their number of outputs alone.
    """
    bases = [layer.base_layer for layer in layers]
    if has_whole_blocks(bases[0]):
        return _packed(bases)
    if len(bases) == 1:
        return [bases[0].weight.data], []
    stacked, parts = _stacked([base.weight.data for base in bases])
    for base, part in zip(bases, parts, strict=True):
        base.weight.data = part
    return [stacked], []


def move(base: Any) -> None:
    """Give a linear layer's weight a new place in memory. Where its neighbours move into stacks, one that stays would
    leave gaps that nothing fits."""
    if not is_in_host_memory(base.weight):
        base.weight.data = base.weight.data.clone()
    if not has_whole_blocks(base):
        return
    state = base.weight.quant_state
    state.absmax = state.absmax.clone()
    if state.nested:
        state.state2.absmax = state.state2.absmax.clone()


def _packed(bases: list[Any]) -> tuple[list[Tensor], list[int]]:
    """Stack 4-bit weights, or list them one after the other where a block of scales would span two layers."""
    each = [packed_weight(base)[0] for base in bases]
    blocks = packed_weight(bases[0])[1]
    # the scales' own blocks, where there are any
    whole = all(packed[2].numel() % blocks[-1] == 0 for packed in each[:-1]) or len(blocks) == 1
    tables = (1, 3) if len(blocks) > 1 else (1,)
    alike = all(torch.equal(packed[table], each[0][table]) for packed in each for table in tables)
    if len(bases) == 1 or not (whole and alike):
        return [tensor for packed in each for tensor in packed], blocks
    states = [base.weight.quant_state for base in bases]
    weights, parts = _stacked([base.weight.data for base in bases])
    scales, of_scales = _stacked([state.absmax for state in states])
    for base, state, part, scale in zip(bases, states, parts, of_scales, strict=True):
        base.weight.data, state.absmax = part, scale
    if len(blocks) == 1:
        return [weights, each[0][1], scales], blocks
    second, of_second = _stacked([state.state2.absmax for state in states])
    for state, part in zip(states, of_second, strict=True):
        state.state2.absmax = part
    # a layer has one offset: repeat it for each of its blocks
    offsets = torch.cat([state.offset.expand(part.numel()) for state, part in zip(states, of_second, strict=True)])
    return [weights, each[0][1], scales, each[0][3], second, offsets], blocks


def _stacked(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    stacked = joined(tensors)
    return stacked, list(stacked.split([len(tensor) for tensor in tensors]))
