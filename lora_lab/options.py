"""The values to choose from where a setting takes one of a few words."""

from enum import Enum


class DType(Enum):
    """A floating-point format; the value is torch's name for it."""

    fp32 = "float32"
    fp16 = "float16"
    bf16 = "bfloat16"


class MethodKind(Enum):
    """What a method trains."""

    lora = "lora"
    """PEFT's adapters on frozen weights."""
    vera = "vera"
    """Two vectors a layer, around a pair of frozen random matrices that all layers share."""
    full = "full"
    """Every weight of the model."""


class Init(Enum):
    """How LoRA's matrices A and B start; s is the factor on their product."""

    kaiming = "kaiming"
    """A uniform as a new linear layer, B zero."""
    gaussian = "gaussian"
    """A normal with a standard deviation of 1 / rank, B zero."""
    orthogonal = "orthogonal"
    """Both random, in directions that cancel out in their product."""
    pissa = "pissa"
    """The weights' first singular vectors, which are taken out of the frozen weights."""
    olora = "olora"
    """The first part of the weights' QR decomposition, which is taken out of the frozen weights."""
    eva = "eva"
    """A from the first singular vectors of the layer's inputs over training rows, B zero."""
    loftq = "loftq"
    """What 4 bit has lost of the weights, as far as the rank allows."""

    @property
    def takes(self) -> bool:
        """Return whether the start is taken out of the frozen weights."""
        return self in (Init.pissa, Init.olora)


class Projection(Enum):
    """Methods by which an optimizer keeps its state for gradients that are projected to a low rank."""

    galore = "galore"
    """To the gradient's first singular vectors; the update is projected back."""
    apollo = "apollo"
    """At random; the whole gradient is scaled, channel by channel, as the projected one was."""
    apollo_mini = "apollo_mini"
    """At random; the whole gradient is scaled as one."""


class Quantization(Enum):
    """Storage formats of the frozen linear layers (bitsandbytes' names)."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"


class ModelSource(Enum):
    """Source of weights and tokenizer."""

    hub = "hub"
    local = "local"
    package = "package"
    tiny = "tiny"


class Weights(Enum):
    """Values of the model's weights. `random` builds the model's shapes without a download, and the byte-level
    tokenizer."""

    pretrained = "pretrained"
    random = "random"


class DataSource(Enum):
    """Source of the rows."""

    shipped = "shipped"
    hub = "hub"
    file = "file"
    jsonl = "file"  # its name in configs from before other kinds of file were read
    random_tokens = "random_tokens"


class Layout(Enum):
    """Kinds of row, and what a record needs to be one."""

    auto = "auto"
    """Found from the columns."""
    chat = "chat"
    instruct = "instruct"
    completion = "completion"
    text = "text"


class TrainOn(Enum):
    """The part of a conversation that is trained. Of a passage it is all but its prompt, or everything."""

    answers = "answers"
    """Every turn of the assistant."""
    last_answer = "last_answer"
    everything = "everything"


class Duplicates(Enum):
    """What is done about rows that are there more than once."""

    keep = "keep"
    exact = "exact"
    """Of equal rows the first is kept."""
    near = "near"
    """Of rows with nearly the same words the first is kept."""


class Batching(Enum):
    """Ways to lay out rows of different lengths as one rectangle of token slots."""

    longest = "longest"
    seq_len = "seq_len"
    packed = "packed"


class TrackingKind(Enum):
    """Kinds of store for the results."""

    local = "local"
    server = "server"
    none = "none"


class Attention(Enum):
    """transformers' attention implementations that a trial may ask for."""

    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class EngineKind(Enum):
    """Ways to compute the training step; the mathematics is the same."""

    eager = "eager"
    """Operation by operation, as in PyTorch, transformers and PEFT."""
    liger = "liger"
    """With the kernels of the package liger-kernel."""
    compile = "compile"
    """Every decoder layer by torch.compile."""
    graph = "graph"
    """Compiled layers; forward and backward recorded once as a CUDA graph and replayed."""


class Checkpointing(Enum):
    """Decoder layers that compute their forward again in the backward, instead of keeping its results."""

    none = "none"
    full = "full"
    selective = "selective"
    """Every other layer."""
    offloaded = "offloaded"
    """Like full, and each layer's input goes to host memory in between."""


class Isolation(Enum):
    """Process of a trial. `process`: one worker process per trial. `inline`: everything in one process, for
    debuggers."""

    process = "process"
    inline = "inline"


class PlacementKind(Enum):
    """Where trials run. `one`: each on one device, one after the other. `each_gpu`: the trials of a sweep side by side,
    one a card. `ddp`: a trial over several cards, each with a copy of the model. `fsdp`: the same, and each card holds
    a part of the frozen weights."""

    one = "one"
    each_gpu = "each_gpu"
    ddp = "ddp"
    fsdp = "fsdp"

    @property
    def shares_trials(self) -> bool:
        """Return whether several workers share a trial."""
        return self in (PlacementKind.ddp, PlacementKind.fsdp)


class ClusterKind(Enum):
    """Machines that the trials of a sweep run on."""

    local = "local"
    slurm = "slurm"
    """Each trial is a job of a Slurm cluster."""
    ray = "ray"
    """Each trial is a task of a Ray cluster."""


class Plan(Enum):
    """Whether a trial runs that certainly does not fit its card, by lora_lab.fit."""

    all = "all"
    fits = "fits"


class Schedule(Enum):
    """Course of the learning rate over a job, after its warm-up."""

    constant = "constant"
    linear = "linear"
    """Falls to 0 in a straight line."""
    cosine = "cosine"
    """Falls to 0 along half a cosine."""


class OnSpike(Enum):
    """What a job does when its loss has risen by `measure.loss_spike`."""

    stop = "stop"
    lower_lr = "lower_lr"
    """Go back to the last checkpoint and continue at a lower learning rate."""
