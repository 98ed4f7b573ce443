"""The events that only a job sends."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlanned:
    """Length of a job, sent before its first step."""

    t: float
    steps: int
    steps_per_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed:
    """A complete checkpoint: training can go on from it."""

    t: float
    step: int
    folder: str
    """Below the trial's folder."""
    total_bytes: int
    epoch: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """A job goes on from a checkpoint: in a new worker after a kill, or in the same one after a spike. Steps after
    `step` that were sent before do not count any more."""

    t: float
    step: int
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spiked:
    """The loss of a job rose by more than `measure.loss_spike`."""

    t: float
    step: int
    reason: str
    action: str
    """An OnSpike."""
    learning_rate: float | None = None
    """The highest of the schedule from now on; None when the job stops."""
    rows: list[int] = field(default_factory=list)
    """The training rows of that step, counted from 0."""
