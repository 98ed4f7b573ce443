"""What a trial has to do, and on what: counted before it runs, for a forecast."""

from dataclasses import dataclass

from lora_lab.events import DataCounted, MatmulRate, ModelCounted


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The size of one micro-batch."""

    rows: int
    width: int
    """Slots of each row: tokens and padding."""
    real: int
    trained: int
    attended: int
    """Sum of the squares of the documents' lengths in tokens."""

    @property
    def slots(self) -> int:
        """Return rows x width."""
        return self.rows * self.width


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's time follows from, counted on the meta device."""

    counted: ModelCounted | None
    """None where the model multiplies in a way that is not known."""
    layers: int
    linears: int
    """Frozen linear layers inside the decoder layers."""
    widths: int
    """Their inputs and outputs added up."""
    matrices: int
    """Trained matrices."""
    hidden: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of one trial."""

    model: ModelFacts
    data: DataCounted
    epoch: list[MicroBatch]
    """The micro-batches of one epoch, in a random order like those of training."""
    steps: int
    """Optimizer steps, of a window with its warm-up."""
    steps_per_epoch: int
    epoch_in_full_steps: float
    """The same in steps of all their micro-batches: the last of a job's epoch may have fewer."""
    evaluations: int
    """Between the first step and the last."""
    checkpoints: int
    heldout: list[MicroBatch]
    """Of one evaluation."""
    general: list[MicroBatch]
    """Of the general text, which is evaluated before and after."""
    answers: int
    """Answers that are written: each prompt by the base and by the tuned model."""


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """How fast the device is, measured once and cached."""

    matmul: MatmulRate
    bytes_per_second: float
    """Read and written by a copy in the device's memory."""
