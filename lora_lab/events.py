"""What a worker says while it works: plain records, one JSON object a line.

All times `t` are seconds of time.monotonic(), one clock for every process of a Linux machine.
"""

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from lora_lab.reading import Damaged, parsed, typed
from lora_lab.secrets import without_secrets


class Phase(Enum):
    """What a worker is doing, in this order; conversion only when weights are used for the first time."""

    start = "start"
    matmul_rate = "matmul_rate"
    """Only the first time on a device: how fast it multiplies matrices."""
    conversion = "conversion"
    data = "data"
    model = "model"
    evaluation_before = "evaluation_before"
    compilation = "compilation"
    """Only with engine=compile and graph: a step of each shape is compiled, and recorded."""
    warm_up = "warm_up"
    window = "window"
    profile = "profile"
    """A few steps after the window under torch's profiler: how long the GPU itself works on a step."""
    evaluation_after = "evaluation_after"
    saving = "saving"


FIRST_STEP = "first_step"
"""The part of the warm-up that a PhaseMemory of this name tells of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker's process runs. `prepared`: it was forked from a server that had its imports."""

    t: float
    pid: int
    prepared: bool
    rank: int = 0
    """Which worker of the trial, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBegan:
    """A phase began; the one before it is over."""

    t: float
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """torch's allocator over one phase (absent on the CPU). `phase` is a Phase, or FIRST_STEP: the first step
    of the warm-up, which the warm-up's own figures then leave out."""

    t: float
    phase: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    reserved_bytes: int | None = None
    """Held by the allocator at the phase's end."""
    device_used_bytes: int | None = None
    """In use on the card by everybody at the phase's end, as the driver tells the worker."""
    retries: int = 0
    """How often the allocator had to give back all it kept and ask again."""
    rank: int = 0
    """Which worker of the trial, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`done` of `total` pieces of the present phase."""

    t: float
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCounted:
    """What became of the rows; tokens `real` and `trained` over the training rows. `digest` is a sha256
    over every example's token ids and labels."""

    t: float
    rows_read: int
    rows_train: int
    rows_heldout: int
    rows_truncated: int
    rows_without_labels: int
    real: int
    trained: int
    digest: str
    rows_lost: int | None = None
    """Rows whose text is not whole in the tokens, or whose end of turn is not trained once; None in trials from before
    they were counted."""
    rows_apart: int | None = None
    """Rows whose prompt and answer had to be tokenised apart."""
    end_of_turn: str = ""
    """What ends each answer; empty where nothing does."""
    rows_repeated: int | None = None
    """Usable rows that are equal to an earlier one; None in trials from before they were counted."""
    rows_heldout_prompt_trained: int | None = None
    """Held-out rows whose prompt is trained on too, with another answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """Read back from the live objects: what really runs, and where it stands in for what was asked."""

    t: float
    facts: dict[str, str]
    stand_ins: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCounted:
    """The live model's weights, counted once the adapters are on it. What a step costs follows from these:
    telemetry/flops.py."""

    t: float
    frozen: int
    """Frozen weights that are multiplied with: those of linear layers, the head too, the embedding's look-up not."""
    frozen_in_layers: int
    """Those of them within the decoder layers, which gradient checkpointing multiplies with once more."""
    trainable: int
    """Trained weights that are multiplied with (LoRA's A and B)."""
    attention_width: int
    """Sum over the layers of query heads x head size."""
    weight_bytes: int
    """All frozen weights as they are held."""
    weight_elements: int
    """Their number, unpacked."""
    layers: int | None = None
    """Decoder layers; None in trials from before they were told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulRate:
    """How fast the device multiplies two square matrices, at best: 2 x size^3 operations over the time."""

    t: float
    dtype: str
    size: int
    flops_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerMemory:
    """The live optimizer state in bytes, each tensor once."""

    t: float
    total_bytes: int
    eligible_bytes: int
    """Of parameters with at least 100,000 elements, the only ones whose state bitsandbytes pages."""
    paged_bytes: int
    """In managed memory, which torch's allocator does not see."""
    paged_tensors: int
    is_paged: bool
    """The optimizer calls itself paged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """Steps were made ready for their shapes."""

    t: float
    seconds: float
    shapes: list[list[int]]
    """Rows and tokens of a row, longest first."""
    graphs: bool
    """They were recorded as CUDA graphs too."""
    working_bytes: int
    """What the largest graph needs while it is replayed, beyond what torch's allocator counts as in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDone:
    """How training went with engine=compile or graph."""

    t: float
    replays: int
    """Micro-batches that were replayed from CUDA graphs."""
    unrecorded: int
    """Micro-batches of a shape that was not recorded: they ran operation by operation."""
    compilations: int
    """Graphs that torch compiled while training ran, after all steps had been made ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """The GPU's own work in some steps after the window, by torch's profiler."""

    t: float
    steps: int
    slots: int
    kernels: int
    busy_seconds: float
    """During which at least one kernel or copy ran, over all those steps."""
    kernel_seconds: float | None = None
    """The kernels' and copies' own times added up."""
    top: list[list[str | int | float]] = field(default_factory=list)
    """Those that took most, by name: [name, how often, seconds], over all those steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Held-out loss in nats a token: the sum over all trained tokens divided by their number."""

    t: float
    phase: str
    loss: float
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step; sent when its loss has arrived, so one or two steps late on a GPU.

    `t` is when the host had queued it, `seconds` the device's time since the end of the step before
    (None for the first; the window's first counts from its opening). `slots` counts every token position with
    padding, `real` without, `trained` those with a label that is predicted."""

    t: float
    step: int
    seconds: float | None
    loss: float
    rows: int
    slots: int
    real: int
    trained: int
    skipped: bool
    """A GradScaler found an overflow and left the weights as they were."""
    attended: int = 0
    """Sum of the squares of the documents' lengths in tokens."""
    attended_slots: int = 0
    """Sum of the squares of the rows' lengths in slots."""
    waited_seconds: float = 0.0
    """Host time between the step before and this one: its batch was read, laid out and sent to the device."""
    adapter: str = ""
    """Which adapter was trained; empty where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowOpened:
    """The device had been synchronised; steps after `after_step` are measured."""

    t: float
    after_step: int
    name: str = "train"
    """What is measured in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowClosed:
    """The device had been synchronised after `after_step`."""

    t: float
    after_step: int
    name: str = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something the user should know."""

    t: float
    text: str
    rank: int = 0
    """Which worker of the trial, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last word of a worker that could still speak."""

    t: float
    outcome: str
    reason: str
    traceback: str | None = None
    step: int | None = None
    asked_bytes: int | None = None
    peak_host_bytes: int | None = None
    """The largest resident size of the worker's process."""
    rank: int = 0
    """Which worker of the trial, from 0."""


Event = (
    Ready
    | PhaseBegan
    | PhaseMemory
    | Progress
    | DataCounted
    | Ran
    | ModelCounted
    | MatmulRate
    | OptimizerMemory
    | Compiled
    | EngineDone
    | Profiled
    | Evaluated
    | Step
    | WindowOpened
    | WindowClosed
    | Warned
    | Ended
)
_BY_NAME: dict[str, Any] = {kind.__name__: kind for kind in Event.__args__}


def encode(event: Event) -> str:
    """One line of JSON, without the newline and without secrets. A loss that is not finite becomes NaN or Infinity."""
    return json.dumps({"event": type(event).__name__, **_clean(asdict(event))})


def _clean(said: Any) -> Any:
    """What libraries say in errors and warnings can hold a token or an address with a password."""
    if isinstance(said, dict):
        return {key: _clean(value) for key, value in said.items()}
    if isinstance(said, (list, tuple)):
        return [_clean(value) for value in said]
    return without_secrets(said) if isinstance(said, str) else said


def decode(line: str | bytes) -> Event:
    """The record that `encode` wrote.

    Raises: Damaged for a line that is torn, of another version, or of something else."""
    fields = parsed(line)
    name = fields.pop("event", None) if isinstance(fields, dict) else None
    if not isinstance(name, str) or name not in _BY_NAME:
        raise Damaged(None, "event", "is missing, or none that this version knows")
    event: Event = typed(_BY_NAME[name], fields)
    return event
