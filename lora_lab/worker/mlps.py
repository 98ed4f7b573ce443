"""Find the MLP of each decoder layer, and say why some cannot be calculated for a part of the tokens at a time."""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.worker.experts import expert_weights
from lora_lab.worker.trainables.trainable import base_of


def text_layers(model: Any) -> list[Any]:
    """List the text's layers that transformers repeats, in order."""
    modules = base_of(model).get_decoder().modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def mlps_of(model: Any) -> list[Any]:
    """List the MLPs of the text's layers, in order; None for a layer without a module of that name."""
    return [getattr(layer, "mlp", None) for layer in text_layers(model)]


def check_mlps(config: TrialConfig, skeleton: Any) -> None:
    """Raise InvalidInput where `engine.mlp_tile` is asked for and the model's modules do not allow it."""
    tile = config.engine.mlp_tile
    if tile is None:
        return
    mlps, fault = mlps_of(skeleton), ""
    if not mlps or None in mlps:
        fault = "its layers have no module named mlp"
    elif any(next(expert_weights(mlp), None) for mlp in mlps):
        fault = "it is a mixture, which gathers the tokens of each expert from all rows"
    elif any(isinstance(module, nn.Dropout) and module.p > 0 for mlp in mlps for module in mlp.modules()):
        fault = "its MLP has dropout, and each tile would have to draw the random numbers twice"
    if fault:
        name = type(skeleton).__name__
        raise InvalidInput(f"engine.mlp_tile={tile} cannot be used with {name}: {fault}. Use engine.mlp_tile=null.")
