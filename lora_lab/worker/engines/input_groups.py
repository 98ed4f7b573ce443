"""Find the layers that get the very same input tensor, by running two tokens through the model."""

from collections import Counter, defaultdict
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from lora_lab.worker.trainables.trainable import base_of

Named = list[tuple[str, ...]]
"""A group, by its layers' names."""
TensorId = tuple[int, int] | None
"""A tensor's id, and how often it had been changed in place."""


def group_by_input(model: Any, layers: list[Any], dtype: torch.dtype) -> list[list[Any]]:
    """Group the layers of one module that get the same tensor one after the other, in the order of their calls. Every
    other layer is a group by itself.

    Modules of one class must have the same groups, or they get none: each would need its own compilation.

    Args:
        model: runs once, on two tokens.
        layers: the layers to group.
        dtype: the compute dtype.
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
        if often[id(layer)] > 1:  # an output that one call hands over, another call would take
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
    """Keep the groups of modules whose class has the same ones everywhere."""
    of: defaultdict[type, defaultdict[int, Named]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        parent = parents[id(group[0])][0]
        of[type(parent)][id(parent)].append(tuple(parents[id(layer)][1] for layer in group))
    alike = {kind for kind, named in of.items() if all(one == next(iter(named.values())) for one in named.values())}
    return [group for group in groups if type(parents[id(group[0])][0]) in alike]


def _calls(model: Any, layers: list[Any], dtype: torch.dtype) -> list[tuple[Any, TensorId]]:
    """List layer calls in order with their inputs. Empty if the model cannot run on two tokens alone."""
    calls: list[tuple[Any, TensorId]] = []
    kept: list[Tensor] = []  # until the end, so that no id is used twice

    def note(layer: Any, args: tuple[Any, ...]) -> None:
        kept.extend(args[:1])
        calls.append((layer, (id(args[0]), args[0]._version) if args else None))

    modes = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    device = layers[0].base_layer.weight.device
    ids = torch.ones((1, 2), dtype=torch.long, device=device)
    try:
        for module, _ in modes:
            # bitsandbytes repacks weights when it evaluates on a CPU
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
