"""Count the live model's weights: those that each token is multiplied with, and the bytes held."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.vera import VeraLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lora_lab.events import ModelCounted
from lora_lab.worker.trainables.trainable import has_adapters


class Uncountable(Exception):
    """The model multiplies in a way that is not known here, so its FLOPs are unknown."""


_BEHIND_MLP = ("post_feedforward", "post_mlp")
"""How modules begin whose backward takes an MLP's output: norms of Gemma, OLMo, GLM."""


def count_model(model: Any, is_compiled: bool = False) -> ModelCounted:
    """Count a model's weights, frozen and trained, before or after training steps.

    A product is counted for each linear layer once, a head that shares the embedding's weights too; the embedding's
    look-up is none. A 4-bit layer counts by its inputs and outputs, however its weights are packed. What DoRA does
    for its norms is not counted: it grows with the weights and not with the tokens. (With adapter dropout DoRA also
    multiplies with the frozen weights a second time, which is not counted either.)

    Attention is taken to be over all that came before in the row; a sliding window shorter than the row is not looked
    at.

    Args:
        is_compiled: whether torch.compile gets whole layers, and leaves out of a checkpointed one what is not needed.

    Raises: Uncountable when a weight with two or more dimensions belongs to no linear layer and no embedding (a
    convolution, a mixture of experts), or no decoder layer is found.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise Uncountable("it has no layers of the kind that transformers checkpoints")
    products = list(_products(model))
    _check_known_layers(model, products)
    shapes = model.config.get_text_config()
    head_size = getattr(shapes, "head_dim", None) or shapes.hidden_size // shapes.num_attention_heads
    frozen, trained = ([each for each in products if each.is_trained is is_trained] for is_trained in (False, True))
    repeated = {each.key for layer in layers for each in _repeated(layer, is_compiled)}
    is_added = has_adapters(model)
    own = [p for name, p in model.named_parameters() if not (is_added and (p.requires_grad or ".lora_" in name))]
    return ModelCounted(
        t=time.monotonic(),
        frozen=sum(each.weights for each in frozen),
        frozen_in_layers=sum(each.weights for each in frozen if each.key in repeated),
        trainable=sum(each.weights for each in trained),
        trainable_in_layers=sum(each.weights for each in trained if each.key in repeated),
        attention_width=len(layers) * shapes.num_attention_heads * head_size,
        weight_bytes=stored_bytes(own),
        weight_elements=sum(_elements(p) for p in own),
        layers=len(layers),
    )


@dataclass(frozen=True, slots=True)
class _Product:
    """A product with a weight."""

    key: tuple[int, str]
    weights: int
    is_trained: bool
    is_adapters: bool
    is_scaled: bool = False
    """Whether a trained vector scales its result, which the backward then needs."""


def _products(module: Any) -> Iterator[_Product]:
    """Yield the products with linear layers, each once, and of VeRA those with its shared matrices."""
    tables = {id(each.base_layer) for each in module.modules() if isinstance(each, TrainableTokensLayer)}
    vera = {id(layer.base_layer): layer for layer in module.modules() if isinstance(layer, VeraLayer)}
    for name, linear in module.named_modules():
        if not isinstance(linear, torch.nn.Linear | Conv1D):  # bitsandbytes' are subclasses of torch's
            continue
        # a head that shares trained tokens is put together in each step, and all of it gets a gradient
        is_trained = linear.weight.requires_grad or id(linear) in tables
        yield _Product((id(linear), ""), _weights(linear), is_trained, ".lora_" in name)
        for rank in vera[id(linear)].r.values() if id(linear) in vera else ():
            layer = vera[id(linear)]
            yield _Product((id(linear), "A"), rank * layer.in_features, False, True, is_scaled=True)
            yield _Product((id(linear), "B"), rank * layer.out_features, False, True, is_scaled=True)


def _repeated(layer: Any, is_compiled: bool) -> list[_Product]:
    """List the products that are calculated once more when a decoder layer is checkpointed. torch stops that as soon as
    it has the last tensor that the backward needs (torch.utils.checkpoint, early_stop): a product's inputs are there
    before the product, and a frozen one at the very end needs nothing. So the last is not repeated. Compiled code
    leaves out the frozen product next to the last adapter too. Modules stand in the order in which they run."""
    products = list(_products(layer))
    if any(name.startswith(_BEHIND_MLP) for name, _ in layer.named_children()):
        return products
    last = [] if products[-1].is_scaled else [products[-1]]
    if is_compiled:
        last += [each for each in products if not each.is_trained and not each.is_adapters][-1:]
    return [each for each in products if each not in last]


def _check_known_layers(model: Any, products: list[_Product]) -> None:
    multiplied = {each.key for each in products}
    known = {
        id(module.weight)
        for module in model.modules()
        if (id(module), "") in multiplied or isinstance(module, torch.nn.Embedding)
    }
    others = [
        name
        for name, p in model.named_parameters()
        if p.dim() > 1 and id(p) not in known and "trainable_tokens" not in name
    ]
    if others:
        raise Uncountable(f"how often it multiplies with {others[0]} is not known ({len(others)} such weights)")


def _weights(linear: Any) -> int:
    """Return inputs times outputs; a packed weight has another shape."""
    if isinstance(linear, torch.nn.Linear):
        return linear.in_features * linear.out_features
    return int(linear.weight.numel())


def _elements(parameter: Any) -> int:
    """Return the number of weights in a parameter, unpacked."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else int(parameter.numel())


def stored_bytes(parameters: Iterable[Any]) -> int:
    """Return the memory of the parameters and of their quantisation, each storage once."""
    tensors = [tensor for parameter in parameters for tensor in (parameter, *_unpacking(parameter))]
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def scales_of(parameter: Any) -> Iterator[torch.Tensor]:
    """Yield the scales of a 4-bit weight, and their own scales when double quantised."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield state.absmax
        state = state.state2


def _unpacking(parameter: Any) -> Iterator[torch.Tensor]:
    """Yield what dequantizing a 4-bit weight needs: scales, and code books."""
    yield from scales_of(parameter)
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (part for part in (state.code, state.offset) if torch.is_tensor(part))
        state = state.state2
