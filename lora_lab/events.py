"""What a worker says while it works: plain records, one JSON object a line.

All times `t` are seconds of time.monotonic(), one clock for every process of a Linux machine.
"""

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Phase(Enum):
    """What a worker is doing, in this order; conversion only when weights are used for the first time."""

    start = "start"
    conversion = "conversion"
    data = "data"
    model = "model"
    evaluation_before = "evaluation_before"
    warm_up = "warm_up"
    window = "window"
    evaluation_after = "evaluation_after"
    saving = "saving"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker's process runs. `prepared`: it was forked from a server that had its imports."""

    t: float
    pid: int
    prepared: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBegan:
    """A phase began; the one before it is over."""

    t: float
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """torch's allocator over one phase, in bytes (absent on the CPU)."""

    t: float
    phase: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """Read back from the live objects: what really runs, and where it stands in for what was asked."""

    t: float
    facts: dict[str, str]
    stand_ins: list[str] = field(default_factory=list)


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
    (None for the first). `slots` counts every token position with padding, `real` without, `trained`
    those with a label that is predicted."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowOpened:
    """The device had been synchronised; steps after `after_step` are measured."""

    t: float
    after_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowClosed:
    """The device had been synchronised after `after_step`."""

    t: float
    after_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something the user should know."""

    t: float
    text: str


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


Event = (
    Ready
    | PhaseBegan
    | PhaseMemory
    | Progress
    | DataCounted
    | Ran
    | Evaluated
    | Step
    | WindowOpened
    | WindowClosed
    | Warned
    | Ended
)
_BY_NAME: dict[str, Any] = {kind.__name__: kind for kind in Event.__args__}


def encode(event: Event) -> str:
    """One line of JSON, without the newline. A loss that is not finite becomes NaN or Infinity."""
    return json.dumps({"event": type(event).__name__, **asdict(event)})


def decode(line: str | bytes) -> Event:
    """The record that `encode` wrote.

    Raises: KeyError or TypeError for a line of another version, json.JSONDecodeError for a torn one."""
    fields = json.loads(line)
    event: Event = _BY_NAME[fields.pop("event")](**fields)
    return event
