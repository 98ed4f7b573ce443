"""Find what trials that train together cannot have."""

from lora_lab.config import AUTO, TrialConfig
from lora_lab.cotrain import FACTORS
from lora_lab.method_config import MethodConfig
from lora_lab.options import (
    Attention,
    Batching,
    ClusterKind,
    DType,
    EngineKind,
    Isolation,
    MethodKind,
    PlacementKind,
    Plan,
)

_PLAIN = MethodConfig()
_VARIANTS = ("init", "freeze_a", "b_learning_rate_ratio", "rank_pattern", "alpha_pattern", "trained_tokens")
"""Settings of LoRA's variants."""


def cotrain_faults(config: TrialConfig) -> list[str]:
    """Return what is wrong with `cotrain` and what it cannot be combined with, one sentence each; empty without it."""
    if not config.cotrain:
        return []
    named = f"cotrain={','.join(config.cotrain)}"
    unknown = [name for name in config.cotrain if name not in FACTORS]
    if unknown or len(set(config.cotrain)) < len(config.cotrain):
        return [
            f"{named} has to name settings in which points that train together differ, each once: "
            f"{', '.join(FACTORS)}. Type for example cotrain=rank,learning_rate."
        ]
    return [f"{named}: {why}" for is_so, why in _reasons(config) if is_so]


def _reasons(config: TrialConfig) -> list[tuple[bool, str]]:
    """Return each reason, and whether it holds."""
    engine, method, optimizer = config.engine, config.method, config.optimizer
    return [
        (
            method.kind is not MethodKind.lora,
            f"method={method.kind.name} trains no A and B of each member's own. Use method=lora or qlora.",
        ),
        *(
            (
                getattr(method, name) != getattr(_PLAIN, name),
                f"method.{name} was not tried with several adapters. Leave it out.",
            )
            for name in _VARIANTS
        ),
        (
            method.dropout > 0,
            f"method.dropout={method.dropout:g} would draw other random numbers than a member alone. Use "
            "method.dropout=0.",
        ),
        (method.use_dora, "DoRA norms each adapter's columns with the base's. Use method.use_dora=false."),
        (
            engine.kind is EngineKind.liger,
            "engine=liger calculates one loss for all rows. Use engine=eager, engine=compile or engine=graph.",
        ),
        (engine.mlp_tile is not None, f"engine.mlp_tile={engine.mlp_tile} cuts rows of one member. Leave it out."),
        (engine.host_layers != 0, f"engine.host_layers={engine.host_layers} is for one adapter. Leave it out."),
        (
            config.precision.dtype is DType.fp16,
            "with precision=fp16 one gradient scaler would skip the step of all members when one overflows. Use "
            "precision=bf16 or fp32.",
        ),
        (
            optimizer.target is not None or optimizer.in_backward,
            "an optimizer of your own, or one that updates in the backward, may mix the members' weights. Use a named "
            "one, for example optimizer=adamw_fused.",
        ),
        (config.train.is_job, "a job has one schedule and one best checkpoint. Leave train.epochs and max_steps out."),
        (
            config.placement.kind is not PlacementKind.one,
            f"members share one device, and placement={config.placement.kind.name} spreads trials. Use placement=one.",
        ),
        (
            config.cluster.kind is not ClusterKind.local,
            f"members run on this machine, not on cluster={config.cluster.kind.name}. Use cluster=local.",
        ),
        (config.isolation is Isolation.inline, "members need a worker of their own. Use isolation=process."),
        (
            config.repeats == AUTO,
            "repeats=auto compares trials that run one after the other. Give repeats a number.",
        ),
        (
            config.plan is Plan.fits,
            "plan=fits chooses single trials. Leave it out; a warning says where a job may not fit.",
        ),
        (
            config.attention is Attention.flash_attention_2 and config.data.batching is Batching.packed,
            "flash attention takes packed documents from one row only. Use attention=sdpa.",
        ),
    ]
