"""What a training step is made of: the sizes that every engine's allocations follow from."""

from dataclasses import dataclass

from lora_lab.config import TrialConfig
from lora_lab.fit.shapes import Linear, Shapes
from lora_lab.fit.tape import Tape
from lora_lab.fit.weights import BYTES, adapted, is_quantised, other_bytes, trains_all
from lora_lab.options import Attention, Batching, Checkpointing, DataSource, EngineKind

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
    """Bytes of a number between layers: 4 where embeddings are in fp32, raised or trained, and where DoRA's magnitudes,
    which are in fp32, meet 4-bit layers, whose output PEFT does not convert back."""
    quantised: bool
    rank: int
    is_masked: bool
    """Whether attention gets a mask: rows of different lengths side by side, packed, or longer than a window that
    slides. Where it slides in some layers alone, the others are taken to be like them."""

    @property
    def trains_all(self) -> bool:
        """Return whether every weight is trained."""
        return trains_all(self.config.method)

    @property
    def inner(self) -> int:
        """Return the bytes of a number between the linear layers of an MLP."""
        return self.cell if self.trains_all else self.stream

    @property
    def head_is_raised(self) -> bool:
        """Return whether the head's weights are wider than products, which take a copy of them."""
        return other_bytes(self.config) > self.cell

    def wide(self, columns: int, each: int | None = None) -> int:
        """Return the bytes of a tensor (tokens, columns)."""
        return self.tokens * columns * (self.cell if each is None else each)

    def has_adapter(self, linear: Linear) -> bool:
        """Return whether a linear layer is adapted."""
        return adapted(self.config.method, linear)


def sizes_of(config: TrialConfig, shapes: Shapes) -> Sizes:
    """Return the sizes of a trial's micro-batch."""
    cell, quantised = BYTES[config.precision.dtype], is_quantised(config.method)
    return Sizes(
        config=config,
        shapes=shapes,
        tokens=config.batch_size * config.seq_len,
        cell=cell,
        stream=4 if other_bytes(config) == 4 or (quantised and config.method.use_dora) else cell,
        quantised=quantised,
        rank=config.method.rank,
        is_masked=_is_masked(config, shapes),
    )


def _is_masked(config: TrialConfig, shapes: Shapes) -> bool:
    slides = shapes.window is not None and config.seq_len >= shapes.window
    if slides or config.data.batching is Batching.packed:
        return True
    if config.engine.kind in (EngineKind.compile, EngineKind.graph):
        return False
    pads = config.batch_size > 1 or config.data.batching is Batching.seq_len
    return pads and config.data.source is not DataSource.random_tokens


def mask_bytes(sizes: Sizes) -> int:
    """Return the bytes of attention's mask, which all layers share: as truth values, and in the products' format."""
    config = sizes.config
    return config.batch_size * config.seq_len**2 * (1 + sizes.cell) if sizes.is_masked else 0


def checkpoints(mode: Checkpointing, number: int) -> bool:
    """Return whether the layer with this number is calculated once more in the backward."""
    return mode in (Checkpointing.full, Checkpointing.offloaded) or (
        mode is Checkpointing.selective and number % 2 == 0
    )


def attention_bytes(sizes: Sizes) -> list[int]:
    """Return the sizes of what attention keeps besides q and k: its output, a sum for each head, and without a fused
    kernel (attention=eager) the scores' softmax in fp32 and in the products' format, and their tanh."""
    shapes, config = sizes.shapes, sizes.config
    kept = [sizes.wide(shapes.query_width), sizes.wide(shapes.heads, 4)]
    if config.attention is Attention.eager:
        scores = config.batch_size * shapes.heads * config.seq_len**2
        kept += [4 * scores, sizes.cell * scores]
        kept += [sizes.cell * scores] if shapes.caps_scores else []
    return kept


def attention_backward(tape: Tape, sizes: Sizes) -> list[int]:
    """Begin what the flash kernel needs for its backward: the gradient of q, added up in fp32; and those of k and v for
    each head of q, where several share one of k (mha_bwd in torch's flash_attn/flash_api.cpp). Other kernels need less.
    """
    shapes = sizes.shapes
    if sizes.is_masked or sizes.config.attention is Attention.eager:
        return []
    found = [tape.new(sizes.wide(shapes.query_width, 4), WORKING)]
    if shapes.key_width < shapes.query_width:
        found += [tape.new(sizes.wide(shapes.query_width), WORKING) for _ in range(2)]
    return found


def adapter_gradients(tape: Tape, sizes: Sizes, linear: Linear) -> None:
    """Begin the gradients of a layer's adapter, in fp32, which stay until the optimizer has taken them."""
    if sizes.config.grad_accum_steps == 1:
        of_a = 0 if sizes.config.method.freeze_a else linear.inputs
        tape.new(4 * sizes.rank * (of_a + linear.outputs), GRADIENTS)


def weight_gradient(tape: Tape, sizes: Sizes, weights: int, is_whole: bool = True) -> None:
    """Begin the gradient of a trained weight: in the products' format, then in the weight's. It stays until the
    optimizer has taken it, or ends at once: when it is added to that of the micro-batches before, or the backward
    updates the weight.

    Args:
        is_whole: False where more is added to it later in the backward.
    """
    ends = gradient_ends(sizes, is_whole)
    held = other_bytes(sizes.config)
    narrow = tape.new(sizes.cell * weights, WORKING) if sizes.cell != held else None
    wide = tape.new(held * weights, WORKING if ends else GRADIENTS)
    tape.free(narrow, wide if ends else None)


def gradient_ends(sizes: Sizes, is_whole: bool) -> bool:
    """Return whether the gradient of a trained weight ends as soon as it is there, see `weight_gradient`."""
    config = sizes.config
    return config.grad_accum_steps > 1 or (config.optimizer.in_backward and is_whole)


def embeddings_gradient(tape: Tape, sizes: Sizes) -> None:
    """Begin the gradient of trained input embeddings, which is added to the head's where they are one: with chunks of
    the loss in its memory, row by row (worker/engines/tied_gradient.py)."""
    engine = sizes.config.engine
    in_chunks = engine.chunked_loss and engine.kind is not EngineKind.liger
    if in_chunks and sizes.shapes.is_tied and other_bytes(sizes.config) == sizes.cell:
        tape.free(*[tape.new(sizes.wide(sizes.shapes.hidden, 4), WORKING) for _ in range(3)])
        return
    ends = sizes.shapes.is_tied or gradient_ends(sizes, is_whole=True)
    size = other_bytes(sizes.config) * sizes.shapes.vocabulary * sizes.shapes.hidden
    found = tape.new(size, WORKING if ends else GRADIENTS)
    tape.free(found if ends else None)
