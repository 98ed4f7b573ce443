"""The events that a worker sends: plain records, written as one JSON object per line.

All times `t` are seconds of time.monotonic(), one clock for every process of a Linux machine."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_lab.job_events import Checkpointed, JobPlanned, Resumed, Spiked
from lora_lab.reading import Damaged, parsed, typed
from lora_lab.secrets import without_secrets

HELDOUT, GENERAL = "heldout", "general"
"""The texts whose loss is calculated: the held-out rows, and the general text that comes with lora_lab."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Start of the worker's process. `prepared`: it was forked from a server whose imports were done."""

    t: float
    pid: int
    prepared: bool
    rank: int = 0
    """Which worker of the trial, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBegan:
    """Beginning of a phase; the one before it is over."""

    t: float
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """Memory of torch's allocator over one phase (absent on the CPU).

    `phase` is a Phase or FIRST_STEP: the first step of the warm-up, which the warm-up's own figures then leave out."""

    t: float
    phase: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    reserved_bytes: int | None = None
    """Held by the allocator at the phase's end."""
    device_used_bytes: int | None = None
    """In use on the card by all processes at the phase's end, as the driver reports it to the worker."""
    retries: int = 0
    """How often the allocator returned all its cached memory to the driver and asked again."""
    rank: int = 0
    """Which worker of the trial, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`done` of `total` pieces of the present phase; a total of 0 is not known yet."""

    t: float
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCounted:
    """Counts of rows and tokens. `real` and `trained` are tokens of the training rows. `digest` is a sha256 over every
    example's token ids and labels."""

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
    this was counted."""
    rows_apart: int | None = None
    """Rows whose prompt and answer had to be tokenised separately."""
    end_of_turn: str = ""
    """What ends each answer; empty where nothing does."""
    kinds: str = ""
    """Whether the rows are conversations, which a chat template lays out, or passages, which none does, or both; empty
    for random tokens, and in trials from before this was noted."""
    rows_repeated: int | None = None
    """Usable rows that are equal to an earlier one; None in trials from before this was counted."""
    rows_heldout_prompt_trained: int | None = None
    """Held-out rows whose prompt is trained on too, with another answer."""
    rows_near_repeated: int | None = None
    """Rows that are not equal to an earlier one, but nearly, or nearly to one of data.heldout_path; None where that was
    not looked for."""
    rows_dropped: int | None = None
    """Rows that data.duplicates left out."""
    rows_in_both: int | None = None
    """Rows that are not trained on because data.heldout_path has them."""
    rows_low_perplexity: int | None = None
    """Rows that data.min_perplexity left out. With it, DataCounted is sent again after the screening."""
    length_median: int | None = None
    """Tokens of half of the rows before they are cut, or fewer; None for random tokens."""
    length_p95: int | None = None
    """Tokens of 95 % of the rows before they are cut, or fewer."""
    length_max: int | None = None
    tokens_cut: int | None = None
    """Tokens beyond seq_len, of all rows together."""
    from_cache: bool | None = None
    """Whether the tokens came from the cache; None in trials from before there was one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What really runs, read back from the live objects, and what stands in for what was asked."""

    t: float
    facts: dict[str, str]
    stand_ins: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCounted:
    """Counts of the live model's weights, taken once the adapters are on it. The cost of a step follows from these:
    telemetry/flops.py."""

    t: float
    frozen: int
    """Frozen weights that take part in products: those of linear layers and the head, but not the embedding's
    look-up."""
    frozen_in_layers: int
    """The part of `frozen` inside the decoder layers, with which gradient checkpointing multiplies once more."""
    trainable: int
    """Trained weights that take part in products: LoRA's A and B, or all that `frozen` would count."""
    attention_width: int
    """Sum over the layers of query heads x head size."""
    weight_bytes: int
    """Bytes of the model's own weights as they are stored, without adapters."""
    weight_elements: int
    """Number of the model's own weights, counted unpacked, without adapters."""
    layers: int | None = None
    """Decoder layers; None in trials from before they were reported."""
    trainable_in_layers: int | None = None
    """The part of `trainable` with which gradient checkpointing multiplies once more; None for all, in trials from
    before it was reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulRate:
    """The device's best rate for products of two square matrices: 2 x size^3 operations over the time."""

    t: float
    dtype: str
    size: int
    flops_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerMemory:
    """Bytes of the live optimizer state, each tensor counted once."""

    t: float
    total_bytes: int
    eligible_bytes: int
    """State of parameters with at least 100,000 elements, the only ones whose state bitsandbytes pages."""
    paged_bytes: int
    """State in managed memory, which torch's allocator does not see."""
    paged_tensors: int
    is_paged: bool
    """Whether the optimizer reports itself as paged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """Preparation of the training step for its shapes."""

    t: float
    seconds: float
    shapes: list[list[int]]
    """Rows and tokens per row, longest first."""
    graphs: bool
    """Whether they were recorded as CUDA graphs too."""
    working_bytes: int
    """Memory that the largest graph needs during a replay, beyond what torch's allocator counts as in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDone:
    """Summary of training with engine=compile or graph."""

    t: float
    replays: int
    """Micro-batches that were replayed from CUDA graphs."""
    unrecorded: int
    """Micro-batches of a shape that was not recorded. They ran operation by operation."""
    compilations: int
    """Graphs that torch compiled while training ran, after all steps had been made ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """The GPU's own work in a few steps after the window, measured by torch's profiler."""

    t: float
    steps: int
    slots: int
    kernels: int
    busy_seconds: float
    """Time over all those steps during which at least one kernel or copy ran."""
    kernel_seconds: float | None = None
    """Sum of the times of all kernels and copies."""
    busy_seconds_each: list[float] = field(default_factory=list)
    """The same for each of those steps; empty where the clocks do not separate them."""
    top: list[list[str | int | float]] = field(default_factory=list)
    """Kernels and copies that took the most time: [name, count, seconds], over all those steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Held-out loss in nats per token: the sum over all trained tokens divided by their number."""

    t: float
    phase: str
    loss: float
    rows: int
    tokens: int
    step: int | None = None
    """The step of a job after which it was calculated; None before and after training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLosses:
    """The loss of every row of a text that was evaluated, in the rows' order."""

    t: float
    phase: str
    text: str
    """HELDOUT or GENERAL."""
    nats: list[float]
    """Summed over the row's trained tokens; six significant digits."""
    tokens: list[int]
    """Trained tokens."""
    digest: str
    """Of the rows' token ids and labels: equal digests mean the same rows, whatever was trained on."""
    step: int | None = None
    """As in Evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """How held-out prompts were answered; the texts are in answers.jsonl. Each list has one entry per prompt."""

    t: float
    tuned: bool
    """By the trained model; False: by the model without what was trained."""
    ended: list[bool]
    """Whether the answer ended its turn, instead of being cut at `most_tokens`."""
    tokens: list[int]
    """Of the answer, without the end of the turn."""
    exact: list[bool]
    """Whether the answer is the gold one."""
    most_tokens: int
    rouge_l: list[float | None] = field(default_factory=list)
    """F1 of each answer by ROUGE-L; None where the gold one is not scored. Empty with `no_rouge_l`, and in trials from
    before this was scored."""
    no_rouge_l: str = ""
    """Why none is scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step. It is sent when its loss has arrived, so one or two steps late on a GPU.

    `t` is when the host queued it. `seconds` is the device's time since the end of the step before (None for the first;
    the window's first step counts from the window's opening). `slots` counts every token position with padding, `real`
    without, `trained` those with a label that is predicted.
    """

    t: float
    step: int
    seconds: float | None
    loss: float
    rows: int
    slots: int
    real: int
    trained: int
    skipped: bool
    """Whether a GradScaler found an overflow and left the weights as they were."""
    attended: int = 0
    """Sum of the squares of the documents' lengths in tokens."""
    attended_slots: int = 0
    """Sum of the squares of the rows' lengths in slots."""
    waited_seconds: float = 0.0
    """Host time between the step before and this one, in which its batch was read, laid out and sent to the device."""
    adapter: str = ""
    """Name of the trained adapter; empty where there is only one."""
    learning_rate: float | None = None
    """The first parameter group's, in a job; None in a window, where it is constant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowOpened:
    """Opening of a window, after the device was synchronised. Steps after `after_step` are measured."""

    t: float
    after_step: int
    name: str = "train"
    """What is measured in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowClosed:
    """Closing of a window, after the device was synchronised behind `after_step`."""

    t: float
    after_step: int
    name: str = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """A warning for the user."""

    t: float
    text: str
    rank: int = 0
    """Which worker of the trial, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfMember:
    """An event of one of the trials that train together; all other events are of all of them."""

    t: float
    member: int
    """Which of them, from 0."""
    said: str
    """The event as `encode` wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last event of a worker that could still report its end."""

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
    | RowLosses
    | Answered
    | Step
    | JobPlanned
    | Checkpointed
    | Resumed
    | Spiked
    | WindowOpened
    | WindowClosed
    | Warned
    | OfMember
    | Ended
)
_BY_NAME: dict[str, Any] = {kind.__name__: kind for kind in Event.__args__}


def encode(event: Event) -> str:
    """Return one line of JSON, without the newline and without secrets. A loss that is not finite becomes NaN or
    Infinity."""
    return json.dumps({"event": type(event).__name__, **_clean(asdict(event))})


def _clean(said: Any) -> Any:
    """Remove secrets. Errors and warnings of libraries can hold a token or an address with a password."""
    if isinstance(said, dict):
        return {key: _clean(value) for key, value in said.items()}
    if isinstance(said, (list, tuple)):
        return [_clean(value) for value in said]
    return without_secrets(said) if isinstance(said, str) else said


def decode(line: str | bytes) -> Event:
    """Read an event that `encode` wrote.

    Raises: Damaged for a line that is torn, of another version, or not an event."""
    fields = parsed(line)
    name = fields.pop("event", None) if isinstance(fields, dict) else None
    if not isinstance(name, str) or name not in _BY_NAME:
        raise Damaged(None, "event", "is missing, or is not one that this version knows")
    event: Event = typed(_BY_NAME[name], fields)
    return event
