"""Refuse settings that the trial refuses for the model's shapes, and those whose memory is not calculated here."""

from lora_lab.config import TIED, InvalidInput, TrialConfig, too_many_layers
from lora_lab.fit.shapes import Experts, Shapes
from lora_lab.fit.weights import adapts_experts, adapts_router, trains_all
from lora_lab.method_config import MethodConfig
from lora_lab.options import Attention, EngineKind, MethodKind, PlacementKind

_TABLES = ("lm_head", "embed_tokens")


def check(config: TrialConfig, shapes: Shapes) -> None:
    """Raise InvalidInput for rows longer than the model's positions, for modules that get no adapter here, and for what
    a model of these shapes does not run with."""
    if config.placement.kind is PlacementKind.fsdp:
        raise InvalidInput(
            "placement=fsdp: what a card needs for its part of the weights, and for the layers that are gathered, was "
            "not measured, so it is not calculated. Run a short trial instead: measure=quick."
        )
    unknown = _unknown_variant(config.method, shapes)
    if unknown:
        raise InvalidInput(f"the memory of {unknown} is not calculated. Run a short trial instead: measure=quick.")
    found = model_fault(config, shapes)
    if found:
        raise InvalidInput(found)
    if shapes.longest is not None and config.seq_len > shapes.longest:
        raise InvalidInput(
            f"seq_len={config.seq_len} is beyond the model's {shapes.longest} positions; use {shapes.longest} or less."
        )
    targets = config.method.target_modules
    if targets == ["all-linear"]:
        return
    there = sorted(linear.name for linear in shapes.linears)
    last = {name: name.rpartition(".")[2] for name in targets}
    tables = [name for name in targets if last[name] in _TABLES]
    if tables:
        raise InvalidInput(
            f"method.target_modules names {', '.join(tables)}: the memory of adapters on embeddings and on the head is "
            f"not calculated here. Leave them out, or run a short trial instead: measure=quick."
        )
    missing = [name for name in targets if last[name] not in there]
    if missing:
        raise InvalidInput(
            f"method.target_modules names {', '.join(missing)}, which the model's layers do not have; they have "
            f"{', '.join(there)}."
        )


def _unknown_variant(method: MethodConfig, shapes: Shapes) -> str:
    """Name the part of a variant of LoRA whose memory is not known; empty where all of it is."""
    if method.kind is MethodKind.vera:
        return "method=vera"
    if method.trained_tokens:
        return "method.trained_tokens"
    if method.freeze_a and shapes.experts is not None:
        return "method.freeze_a=true with a mixture of experts"
    return "method.rank_pattern" if method.rank_pattern else ""


def model_fault(config: TrialConfig, shapes: Shapes) -> str:
    """Return why a model of these shapes cannot be trained or calculated with these settings; empty where it can."""
    if shapes.caps_scores and config.attention is Attention.sdpa:
        return "attention=sdpa cannot cap the scores, as this model does. Use attention=eager."
    if shapes.caps_logits and config.engine.chunked_loss and config.engine.kind is not EngineKind.liger:
        return (
            "engine.chunked_loss=true cannot cap the logits, as this model does. Use engine.chunked_loss=false or "
            "engine=liger."
        )
    if config.engine.host_embeddings is True and shapes.is_tied:
        return TIED
    if trains_all(config.method):
        fault = _unknown_of_full(config, shapes)
        if fault:
            return fault
    fault = too_many_layers(config.engine.host_layers, shapes.layers)
    if fault:
        return fault
    return _mixture_fault(config, shapes.experts) if shapes.experts else ""


def _unknown_of_full(config: TrialConfig, shapes: Shapes) -> str:
    """Return why the memory of training every weight is not calculated; empty where it is."""
    engine, what = config.engine, ""
    if engine.kind is EngineKind.liger and engine.chunked_loss:
        what = "engine=liger"
    elif engine.mlp_tile is not None:
        what = f"engine.mlp_tile={engine.mlp_tile}"
    elif shapes.experts is not None:
        what = "a mixture of experts"
    elif shapes.layer_norms == 4:
        what = f"model_type={shapes.family}"
    instead = "Run a short trial instead: measure=quick."
    return what and f"the memory of method=full is not calculated here for {what}. {instead}"


def _mixture_fault(config: TrialConfig, experts: Experts) -> str:
    kind, method = config.engine.kind, config.method
    if config.engine.host_layers:
        return (
            f"engine.host_layers={config.engine.host_layers} moves linear layers, and a mixture's experts are none. "
            "Use engine.host_layers=0."
        )
    if config.engine.mlp_tile is not None:
        return (
            f"engine.mlp_tile={config.engine.mlp_tile} takes an MLP apart by tokens, and a mixture gathers those of "
            "each expert from all rows. Use engine.mlp_tile=null."
        )
    if kind in (EngineKind.compile, EngineKind.graph):
        return f"engine={kind.name} cannot compile PEFT's adapters on a mixture of experts. Use engine=eager."
    if kind is EngineKind.liger:
        return (
            "the memory of a mixture of experts is not calculated for engine=liger, which has its own kernel for them. "
            "Use engine=eager, or run a short trial instead: measure=quick."
        )
    if (method.use_dora or method.dropout) and (adapts_experts(method) or adapts_router(method, experts)):
        what = "method.use_dora=true" if method.use_dora else f"method.dropout={method.dropout:g}"
        return (
            f"{what}: PEFT adapts experts and their router only without DoRA and dropout. Leave it out, or name other "
            "modules: method.target_modules=[q_proj,k_proj,v_proj,o_proj]."
        )
    return ""
