"""Find what cannot be combined with a variant of LoRA, or would have no effect with it."""

from typing import Any

from lora_lab.config import TrialConfig
from lora_lab.method_config import MethodConfig
from lora_lab.options import EngineKind, Init, MethodKind, PlacementKind, Quantization, Weights

_OF_LORA = ("alpha", "use_rslora", "use_dora", "init", "freeze_a", "b_learning_rate_ratio")
"""Fields of `method` that are of LoRA's own matrices."""
_PATTERNS = ("rank_pattern", "alpha_pattern")
_DEFAULTS = MethodConfig()


def variant_faults(config: TrialConfig) -> list[str]:
    """Return what a trial's adapters cannot be together, one sentence each."""
    if config.method.kind is MethodKind.vera:
        return _vera_faults(config)
    if config.method.kind is MethodKind.full:
        return []
    return [
        *_start_faults(config),
        *_rate_faults(config.method),
        *_pattern_faults(config.method),
        *_token_faults(config),
    ]


def _vera_faults(config: TrialConfig) -> list[str]:
    method = config.method
    found = [
        f"method.{name} goes with LoRA's two matrices, and method=vera trains none. Leave it out."
        for name in (*_OF_LORA, *_PATTERNS, "trained_tokens")
        if getattr(method, name) != getattr(_DEFAULTS, name)
    ]
    if config.placement.kind is PlacementKind.fsdp:
        found.append("method=vera with placement=fsdp was not tried. Use placement=ddp, or method=lora.")
    return found


def _start_faults(config: TrialConfig) -> list[str]:
    method = config.method
    what, found = f"method.init={method.init.name}", []
    is_quantised = method.quantization is not Quantization.none
    if method.init.takes and is_quantised:
        found.append(
            f"{what} takes its start out of the frozen weights, and rounding the rest to 4 bit again would change them "
            "by more than that. Use method.init=loftq, or method.quantization=none method.double_quantization=false."
        )
    if method.init is Init.orthogonal and is_quantised:
        found.append(f"{what}: PEFT gives its matrices the format of weights in 4 bit. Use method.init=gaussian.")
    if method.init is Init.orthogonal and method.rank % 2:
        found.append(f"{what} needs an even rank, not method.rank={method.rank}. Use method.rank={method.rank + 1}.")
    if method.init is Init.eva and method.rank_pattern:
        found.append(f"{what}: PEFT gives layers with one input one rank. Leave method.rank_pattern out.")
    if method.init is Init.loftq and not is_quantised:
        found.append(f"{what} starts from what 4 bit has lost, and method.quantization=none. Use method=loftq.")
    if method.init is Init.loftq and config.model.weights is Weights.random:
        found.append(
            f"{what} reads the whole weights from the model's files, and model.weights=random has none. Use pretrained "
            "weights, or method=qlora, which costs the same in each step."
        )
    if method.init is Init.loftq and config.engine.host_layers:
        found.append(f"{what} with engine.host_layers was not tried. Use engine.host_layers=0, or method=qlora.")
    if method.use_dora and (method.init.takes or method.init is Init.loftq):
        found.append(
            f"{what} with method.use_dora=true: DoRA's norms would be those of other weights. Use one of them."
        )
    tables = _tables(method)
    if tables and method.init not in (Init.kaiming, Init.gaussian):
        found.append(
            f"{what} starts from linear layers within the model, and method.target_modules names {', '.join(tables)}. "
            "Leave that out, or use method.init=kaiming."
        )
    return found + _shared_faults(config, what)


def _shared_faults(config: TrialConfig, what: str) -> list[str]:
    """Find starts that workers cannot make together."""
    init, placement = config.method.init, config.placement
    if init is Init.eva and placement.world_size > 1:
        return [f"{what}: each worker would find a start by itself. Use placement=one, or method.init=kaiming."]
    if placement.kind is PlacementKind.fsdp and init not in (Init.kaiming, Init.gaussian):
        return [
            f"{what} starts from whole weights, which placement=fsdp has on no card. Use method.init=kaiming, or "
            "placement=ddp."
        ]
    return []


def _rate_faults(method: MethodConfig) -> list[str]:
    if not method.freeze_a or method.b_learning_rate_ratio is None:
        return []
    return [
        f"method.b_learning_rate_ratio={method.b_learning_rate_ratio:g} is between B and A, and method.freeze_a=true "
        "trains no A. Leave it out, and use a larger learning_rate."
    ]


def _pattern_faults(method: MethodConfig) -> list[str]:
    found = []
    for name in _PATTERNS:
        pattern = getattr(method, name)
        if not _is_pattern(pattern, int if name == "rank_pattern" else (int, float)):
            return [
                f"method.{name}={pattern} does not give modules a number each. Write for example "
                f"'method.{name}={{q_proj: 32}}'."
            ]
        found += [
            f"method.{name} gives {module} the value {value:g}, which must be greater than 0."
            for module, value in (pattern or {}).items()
            if not 0 < value < 2**16
        ]
    odd = [f"{module}: {rank}" for module, rank in (method.rank_pattern or {}).items() if rank % 2]
    if odd and method.init is Init.orthogonal:
        found.append(f"method.init=orthogonal needs even ranks, and method.rank_pattern has {', '.join(odd)}.")
    return found


def _token_faults(config: TrialConfig) -> list[str]:
    if not config.method.trained_tokens:
        return []
    engine, what, found = config.engine, "method.trained_tokens", []
    if engine.kind is EngineKind.graph:
        found.append(f"{what} copies numbers to the card in each step, which engine=graph cannot. Use engine=compile.")
    if engine.chunked_loss:
        found.append(f"{what}: engine.chunked_loss=true needs a frozen head. Use engine.chunked_loss=false.")
    if engine.host_embeddings is True:
        found.append(f"{what}: engine.host_embeddings=true needs frozen ones. Use engine.host_embeddings=false.")
    if config.placement.kind is PlacementKind.fsdp:
        found.append(f"{what} with placement=fsdp was not tried. Use placement=ddp.")
    if _tables(config.method):
        found.append(f"{what} and method.target_modules both train the embeddings. Leave one of them out.")
    return found


def _tables(method: MethodConfig) -> list[str]:
    """Return the target modules that are embeddings or the head."""
    return [name for name in method.target_modules if name.rpartition(".")[2] in ("lm_head", "embed_tokens")]


def _is_pattern(pattern: Any, kinds: Any) -> bool:
    return pattern is None or (
        isinstance(pattern, dict)
        and all(isinstance(name, str) for name in pattern)
        and all(isinstance(value, kinds) and not isinstance(value, bool) for value in pattern.values())
    )
