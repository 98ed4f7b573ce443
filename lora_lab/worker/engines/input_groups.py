"""Which layers are given the very same tensor: seen while two tokens run through the model."""

from collections import Counter, defaultdict
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from lora_lab.worker.trainables.trainable import base_of

Named = list[tuple[str, ...]]
"""A module's groups, each by its layers' names."""
TensorId = tuple[int, int] | None
"""Which tensor, and how often it had been changed in place."""


def group_by_input(model: Any, layers: list[Any], dtype: torch.dtype) -> list[list[Any]]:
    """Layers of one module that one after the other are given the same tensor, as groups in the order of their calls;
    every other layer is a group by itself.

    Where modules of one class come out differently they have no groups: they would be compiled one by one.

    Args:
        model: a PeftModel; it runs once, on two tokens.
        layers: those to look at.
        dtype: what it calculates in.
    """
    if len(layers) < 2:
        return [[layer] for layer in layers]
    parents = {id(child): (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    calls = _calls(model, layers, dtype)
    often = Counter(id(layer) for layer, _ in calls)
    last: dict[int, tuple[TensorId, list[Any]]] = {}
    groups: list[list[Any]] = []
    for layer, tensor in calls:
        parent = id(parents[id(layer)][0])
        before, group = last.get(parent, (None, []))
        if often[id(layer)] > 1:  # what one call hands over, another would have to take
            last.pop(parent, None)
        elif tensor is not None and before == tensor:
            group.append(layer)
        else:
            groups.append([layer])
            last[parent] = tensor, groups[-1]
    found = _where_all_are_alike(groups, parents)
    grouped = {id(layer) for group in found for layer in group}
    return found + [[layer] for layer in layers if id(layer) not in grouped]


def _where_all_are_alike(groups: list[list[Any]], parents: dict[int, tuple[Any, str]]) -> list[list[Any]]:
    """The groups of modules whose class has the same ones everywhere."""
    of: defaultdict[type, defaultdict[int, Named]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        parent = parents[id(group[0])][0]
        of[type(parent)][id(parent)].append(tuple(parents[id(layer)][1] for layer in group))
    alike = {kind for kind, named in of.items() if all(one == next(iter(named.values())) for one in named.values())}
    return [group for group in groups if type(parents[id(group[0])][0]) in alike]


def _calls(model: Any, layers: list[Any], dtype: torch.dtype) -> list[tuple[Any, TensorId]]:
    """Each call of a layer, in order, and what it was given; none of a model that can't be run on two tokens alone."""
    calls: list[tuple[Any, TensorId]] = []
    kept: list[Tensor] = []  # until the end, so that none takes another's place

    def note(layer: Any, args: tuple[Any, ...]) -> None:
        kept.extend(args[:1])
        calls.append((layer, (id(args[0]), args[0]._version) if args else None))

    modes = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    device = layers[0].base_layer.weight.device
    ids = torch.ones((1, 2), dtype=torch.long, device=device)
    try:
        for module, _ in modes:
            # bitsandbytes lays weights out anew when it evaluates on a CPU
            module.training = isinstance(module, Linear4bit)
        autocast = torch.autocast(device.type, dtype, dtype is not torch.float32)
        with torch.no_grad(), autocast, torch.compiler.set_stance("force_eager"):
            base_of(model)(input_ids=ids)
    except (TypeError, ValueError):
        return []
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return calls
