"""The part of the schema that says what is trained, in which precision, and by which optimizer."""

from dataclasses import dataclass
from typing import Any

from lora_lab.options import DType, Init, MethodKind, Projection, Quantization
from lora_lab.settings import setting

LARGEST = 3.4e38
"""The largest float32."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """The optimizer that updates what is trained: one of `optim` and `target`."""

    optim: str | None = setting(None, "a name that transformers' TrainingArguments.optim knows")
    target: str | None = setting(None, "import path of a torch.optim.Optimizer subclass, for example torch.optim.SGD")
    args: dict[str, Any] = setting(
        factory=dict, help="keyword arguments for `target`; the learning rate is added from `learning_rate`"
    )
    weight_decay: float = setting(
        0.0, "decoupled weight decay, as transformers applies it (not to biases and norms)", least=0, most=LARGEST
    )
    projection: Projection | None = setting(
        None, "with method=full, keep the state for gradients of a low rank: galore, apollo or apollo_mini"
    )
    projection_rank: int = setting(128, "rank of projected gradients", above=0, most=2**16)
    projection_steps: int = setting(
        200, "optimizer steps after which the projection is chosen again", above=0, most=10**9
    )
    in_backward: bool = setting(
        False, "update each weight as soon as the backward has its gradient, so that gradients are never all held"
    )


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Number format of frozen weights that are not quantised, and of the computation. Trained weights are fp32 in
    all, but for method.held_in=bf16."""

    dtype: DType = setting(DType.bf16, "bf16, fp16 or fp32")


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    """What is trained, and how the frozen weights are stored."""

    kind: MethodKind = setting(
        MethodKind.lora,
        "lora: adapters on frozen weights; vera: vectors around frozen random matrices; full: every weight",
    )
    held_in: DType = setting(
        DType.fp32, "with method=full, how weights are held: fp32, or bf16, which rounds each update at random"
    )
    quantization: Quantization = setting(Quantization.none, "how frozen linear layers are stored: none, nf4 or fp4")
    double_quantization: bool = setting(False, "quantise the 4-bit scales too: about 0.37 bit per weight less")
    mostly_unquantised: bool = setting(False, "run even if less than half of the layers' weights can be held in 4 bit")
    rank: int = setting(16, "rank of the adapters", above=0, most=2**16)
    alpha: float = setting(
        32.0, "the update is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)", above=0, most=LARGEST
    )
    dropout: float = setting(0.0, "probability that an adapter input is dropped while training", least=0, below=1)
    target_modules: list[str] = setting(
        factory=lambda: ["all-linear"],
        help="module names that get an adapter; [all-linear] is every linear layer except the head",
    )
    use_rslora: bool = setting(False, "scale by alpha / sqrt(rank)")
    use_dora: bool = setting(False, "train each column's norm as well")
    init: Init = setting(
        Init.kaiming, "how A and B start: kaiming, gaussian, orthogonal, pissa, olora, eva or, in 4 bit, loftq"
    )
    freeze_a: bool = setting(False, "LoRA-FA: train B alone, so that no layer keeps its input for A's gradient")
    b_learning_rate_ratio: float | None = setting(
        None, "LoRA+: the learning rate of B is this many times that of A", above=0, most=10**6
    )
    rank_pattern: Any = setting(  # dict[str, int] | None, which OmegaConf can't set
        None, "ranks of the modules that are named, instead of method.rank: {q_proj: 32}"
    )
    alpha_pattern: Any = setting(  # dict[str, float] | None
        None, "alphas of the modules that are named, instead of method.alpha: {q_proj: 64}"
    )
    trained_tokens: list[str] = setting(
        factory=list, help="tokens whose embeddings are trained too: ['<|im_start|>','<|im_end|>']"
    )
    raise_to_fp32: bool = setting(
        False,
        "raise every non-quantised frozen weight to fp32, as prepare_model_for_kbit_training does",
    )
    # Costs 2 bytes per weight of the embeddings, head and norms (0.47 GB for Qwen2.5-1.5B), and as much again in the
    # computation: its peak at 1x512 rose by 0.91 GiB on an H100.
