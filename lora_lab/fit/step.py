"""What a training step is made of: the sizes that every engine's allocations follow from."""

from dataclasses import dataclass

from lora_lab.config import TrialConfig
from lora_lab.fit.shapes import Linear, Shapes
from lora_lab.fit.tape import Tape
from lora_lab.fit.weights import BYTES, adapted, is_quantised

WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER = "weights", "adapters", "gradients", "optimizer"
ACTIVATIONS, LOSS, WORKING = "activations", "loss", "working"
PARTS = (WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS, WORKING)
"""What memory is held for, in the order in which it is shown."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of one micro-batch."""

    config: TrialConfig
    shapes: Shapes
    tokens: int
    """Slots: rows times tokens in a row, padding included."""
    cell: int
    """Bytes of a number in products."""
    stream: int
    """Bytes of a number between layers: 4 where embeddings are raised to fp32."""
    quantised: bool
    rank: int

    def wide(self, columns: int, each: int | None = None) -> int:
        """Return the bytes of a tensor (tokens, columns)."""
        return self.tokens * columns * (self.cell if each is None else each)

    def has_adapter(self, linear: Linear) -> bool:
        """Return whether a linear layer is adapted."""
        return adapted(self.config.method, linear)


def sizes_of(config: TrialConfig, shapes: Shapes) -> Sizes:
    """Return the sizes of a trial's micro-batch."""
    cell = BYTES[config.precision.dtype]
    return Sizes(
        config=config,
        shapes=shapes,
        tokens=config.batch_size * config.seq_len,
        cell=cell,
        stream=4 if config.method.raise_to_fp32 else cell,
        quantised=is_quantised(config.method),
        rank=config.method.rank,
    )


def adapter_gradients(tape: Tape, sizes: Sizes, linear: Linear) -> None:
    """Begin the gradients of a layer's adapter, in fp32, which stay until the optimizer has taken them."""
    if sizes.config.grad_accum_steps == 1:
        tape.new(4 * sizes.rank * (linear.inputs + linear.outputs), GRADIENTS)
