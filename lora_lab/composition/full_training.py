"""Find what cannot be combined with training every weight of a model."""

import dataclasses

from lora_lab.config import TrialConfig
from lora_lab.method_config import MethodConfig
from lora_lab.options import DType, EngineKind, MethodKind, Quantization

_OF_THE_KIND = ("kind", "quantization", "held_in")
"""Fields of `method` that mean something here."""


def full_faults(config: TrialConfig) -> list[str]:
    """Return what a trial with method=full cannot have, one sentence each; empty for other methods."""
    method, engine = config.method, config.engine
    if method.kind is not MethodKind.full:
        return [] if method.held_in is DType.fp32 else [_HELD_WITHOUT]
    found = [
        f"method.{field.name}={getattr(method, field.name)} has no effect with method=full. Leave it out."
        for field in dataclasses.fields(MethodConfig)
        if field.name not in _OF_THE_KIND and getattr(method, field.name) != getattr(_DEFAULTS, field.name)
    ]
    if method.held_in is not DType.fp32:
        found += _held_faults(config)
    if method.quantization is not Quantization.none:
        found.append(
            f"method=full trains every weight, and weights in 4 bit (method.quantization={method.quantization.name}) "
            "cannot be trained. Use method.quantization=none, or method=qlora."
        )
    if engine.kind is EngineKind.graph:
        found.append(
            "engine=graph with method=full: a CUDA graph would hold the gradient of every weight twice. Use "
            "engine=compile, engine=liger or engine=eager."
        )
    if engine.host_embeddings is True:
        found.append(
            "engine.host_embeddings=true keeps frozen embeddings in host memory, and method=full trains them. Use "
            "engine.host_embeddings=false."
        )
    return found


def _held_faults(config: TrialConfig) -> list[str]:
    what, found = f"method.held_in={config.method.held_in.name}", []
    if config.method.held_in is not DType.bf16:
        found.append(f"{what} is too narrow a range for weights. Use method.held_in=bf16 or fp32.")
    if config.precision.dtype is not DType.bf16:
        found.append(
            f"{what} with precision={config.precision.dtype.name}: weights that are held in bf16 are multiplied in "
            "bf16. Use precision=bf16, or method.held_in=fp32."
        )
    if config.placement.world_size > 1:
        found.append(f"{what} with several workers: each would round its weights its own way. Use placement=one.")
    return found


_DEFAULTS = MethodConfig()
_HELD_WITHOUT = "method.held_in is of method=full; adapters are always held in fp32. Leave it out, or use method=full."
