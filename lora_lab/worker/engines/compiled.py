"""Compile decoder layers by torch.compile, one compilation for all of them."""

from collections import Counter
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_lab.options import Checkpointing
from lora_lab.outcome import Unsupported
from lora_lab.worker.engines.checkpointed_calls import CheckpointedCall
from lora_lab.worker.engines.input_gradient import require_input_gradient
from lora_lab.worker.engines.offloaded_checkpoints import OffloadedCall
from lora_lab.worker.shards import call_of, set_call
from lora_lab.worker.trainables.trainable import base_of

MOST_COMPILATIONS = 64
"""Of one layer's code: one for each row length, twice that where only every other layer is checkpointed. And of the
dequantization, one for each shape of a weight."""

MEANT_TO_BREAK = "the MLP is calculated in tiles"
"""Why a layer's compiled code is left at its MLP: a loop over tiles within it would be unrolled."""


def compilations() -> int:
    """Return how many graphs torch has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def decoder_layers(model: Any) -> list[Any]:
    """List the layers that transformers repeats, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: Any, whole: bool = True) -> None:
    """Compile each decoder layer for the shapes that come. A graph break or too many shapes is an error, never a silent
    slow path.

    Args:
        whole: False lets a layer leave its compiled code; `check_breaks` then says where else than it should.

    Raises: Unsupported when the model has no layers of the kind that transformers repeats.
    """
    layers = decoder_layers(model)
    if not layers:
        name = type(base_of(model)).__name__
        raise Unsupported(f"{name} has no layers that could be compiled one by one. Use engine=eager.")
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = MOST_COMPILATIONS
    require_input_gradient(model)
    for layer in layers:
        set_call(layer, torch.compile(layer._call_impl, fullgraph=whole, dynamic=False))


def graph_breaks() -> Counter[str]:
    """Count how often compiled code was left in this process, by torch's reasons."""
    return Counter(counters["graph_break"])


def check_breaks(found: Counter[str]) -> None:
    """Raise Unsupported where compiled code was left for another reason than MEANT_TO_BREAK."""
    others = [reason for reason in found if MEANT_TO_BREAK not in reason]
    if others:
        raise Unsupported(
            "engine.mlp_tile: torch.compile leaves this model's layers elsewhere than at their MLP, which would be "
            f"slow: {others[0].splitlines()[0]}. Use engine.mlp_tile=null or engine=eager."
        )


def is_compiled(layer: Any) -> bool:
    """Return True for a layer whose call torch compiles."""
    call = call_of(layer)
    return bool((call.call if isinstance(call, CheckpointedCall) else call) != layer._call_impl)


def checkpointing_of(model: Any) -> Checkpointing:
    """Read from the live layers which of them recompute their forward."""
    layers = decoder_layers(model)
    if layers and all(isinstance(call_of(layer), OffloadedCall) for layer in layers):
        return Checkpointing.offloaded
    on = [isinstance(call_of(layer), CheckpointedCall) or layer.gradient_checkpointing for layer in layers]
    if not any(on):
        return Checkpointing.none
    return Checkpointing.full if all(on) else Checkpointing.selective
