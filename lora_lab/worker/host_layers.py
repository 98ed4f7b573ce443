"""Keep the 4-bit weights of decoder layers in host memory: for models that are larger than the card.

A step needs each weight for a moment, in 16 bit. The kernel that unpacks it reads the packed bytes over PCIe. Nothing
else changes: every engine works as before, also in a CUDA graph. The scales, a few percent of the bytes, stay on the
card.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lora_lab.config import ALL, InvalidInput, TrialConfig, too_many_layers
from lora_lab.outcome import Unsupported
from lora_lab.worker.experts import expert_weights
from lora_lab.worker.host_memory import copy_to_host, is_in_host_memory
from lora_lab.worker.mlps import text_layers
from lora_lab.worker.quantised import is_quantised

Copied = Callable[[Tensor], Tensor]
"""Copies a tensor to host memory. Raises: MemoryError."""


def check_host_layers(config: TrialConfig, skeleton: Any) -> None:
    """Raise InvalidInput where `engine.host_layers` is asked for and the model's modules do not allow it."""
    asked, layers = config.engine.host_layers, text_layers(skeleton)
    if not asked:
        return
    fault = ""
    if any(next(expert_weights(layer), None) for layer in layers):
        fault = "it is a mixture, whose experts are not linear layers"
    elif not layers:
        fault = "it has no layers that transformers repeats"
    if fault:
        name = type(skeleton).__name__
        raise InvalidInput(f"engine.host_layers={asked} cannot be used with {name}: {fault}. Use engine.host_layers=0.")
    fault = too_many_layers(asked, len(layers))
    if fault:
        raise InvalidInput(fault)


@contextlib.contextmanager
def hosting(asked: int | str, copied: Copied = copy_to_host) -> Iterator[None]:
    """Move the layers' weights to host memory while transformers loads them, each as soon as it is in 4 bit. So a model
    that is larger than the card can be loaded.

    Args:
        asked: how many layers, or all.

    Raises: Unsupported when there is not enough host memory."""
    from transformers import modeling_utils
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize  # imports bitsandbytes, as loading 4 bit does

    convert = Bnb4bitQuantize.convert
    refused: list[MemoryError] = []

    def convert_and_move(self: Any, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        made = convert(self, input_dict, *args, **kwargs)
        model = kwargs["model"]
        inside = tuple(f"{name}." for name in _names(model, asked))
        for name, weight in made.items():
            if name.startswith(inside):
                try:
                    weight.data = copied(weight.data)
                except MemoryError as error:  # transformers would report it as any other error
                    refused.append(error)
                    raise
        return made

    # it reserves as much of the card as the whole model takes, to load faster
    warm_up, modeling_utils.caching_allocator_warmup = modeling_utils.caching_allocator_warmup, lambda *_: None
    Bnb4bitQuantize.convert = convert_and_move
    try:
        yield
    except RuntimeError:
        if not refused:
            raise
    finally:
        Bnb4bitQuantize.convert, modeling_utils.caching_allocator_warmup = convert, warm_up
    if refused:
        raise no_room(asked, refused[0])


def move_layers(model: Any, asked: int | str, copied: Copied = copy_to_host) -> None:
    """Move the 4-bit weights of the first layers that are not there yet: those of a checkpoint that was in 4 bit.

    Args:
        asked: how many layers, or all.

    Raises: Unsupported when there is not enough host memory."""
    for layer in _first(text_layers(model), asked):
        for weight in _weights(layer):
            if not is_in_host_memory(weight):
                try:
                    weight.data = copied(weight.data)
                except MemoryError as error:
                    raise no_room(asked, error) from error


def layers_in_host_memory(model: Any) -> tuple[int, int]:
    """Count the layers whose 4-bit weights are all in host memory, as the driver says, and all layers."""
    each = [_weights(layer) for layer in text_layers(model)]
    return sum(bool(weights) and all(map(is_in_host_memory, weights)) for weights in each), len(each)


def _weights(layer: Any) -> list[Any]:
    weights = [module.weight for module in layer.modules() if is_quantised(module) and hasattr(module, "weight")]
    return [weight for weight in weights if getattr(weight, "quant_state", None) is not None]


def _names(model: Any, asked: int | str) -> list[str]:
    chosen = {id(layer) for layer in _first(text_layers(model), asked)}
    return [name for name, module in model.named_modules() if id(module) in chosen]


def _first(layers: list[Any], asked: int | str) -> list[Any]:
    return layers if asked == ALL else layers[: int(asked)]


def no_room(asked: int | str, error: MemoryError) -> Unsupported:
    """Return what ends a trial when the driver refuses host memory."""
    return Unsupported(
        f"engine.host_layers={asked}: this machine did not give as much host memory that stays in place ({error}). "
        "Name fewer layers, or use engine.host_layers=0."
    )
