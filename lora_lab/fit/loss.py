"""The allocations of the loss: all logits at once, or a chunk of them at a time."""

import math
from collections.abc import Sequence

from lora_lab.fit.step import ACTIVATIONS, GRADIENTS, LOSS, WORKING, Sizes, gradient_ends, weight_gradient
from lora_lab.fit.tape import Tape
from lora_lab.fit.weights import other_bytes
from lora_lab.options import DType

CHUNK_ELEMENTS = 2**26
"""As worker/engines/chunked_loss.py has it, which cannot be imported without torch; a test compares the two."""
_WIDER, _PARTS, _ALIGNED = 8, 4, 64
_SUMMED_IN_BF16, _PIECE = 64, 2**24
"""Chunks up to which a trained head's gradient is summed in bf16, and elements of it that are scaled together."""


def chunk_rows(rows: int, vocabulary: int, hidden: int, mlp_tile: int | None = None) -> int:
    """Return the rows of a chunk of our own loss; `hidden` is 0 where it is not compiled."""
    together = min(rows, mlp_tile or rows)
    most = max(1, max(CHUNK_ELEMENTS, together * min(_WIDER * hidden, vocabulary // _PARTS)) // vocabulary)
    even = math.ceil(rows / math.ceil(rows / most))
    aligned = math.ceil(even / _ALIGNED) * _ALIGNED
    return aligned if aligned <= most else max(most // _ALIGNED * _ALIGNED, min(even, _ALIGNED))


def liger_chunk_rows(rows: int, vocabulary: int, hidden: int) -> int:
    """Return the rows of a chunk of liger-kernel's fused loss."""
    factor = math.ceil(vocabulary / hidden)
    rows_of_chunk = math.ceil(rows / factor)
    return int(2 ** math.ceil(math.log2(rows_of_chunk)))


def whole_loss(tape: Tape, sizes: Sizes, hidden: int, cast: Sequence[int] = ()) -> int:
    """Write forward and backward of transformers' loss; return the gradient of `hidden`, which ends.

    Args:
        cast: copies of weights that end with the forward.

    The loss takes the logits in fp32. Its logarithm is kept for the backward. accelerate turns the model's own output,
    which nobody reads, into fp32 as well. The backward holds three tensors of fp32: the logarithm, its gradient, and
    the gradient of the logits.
    """
    vocabulary = sizes.shapes.vocabulary
    kept = None
    if sizes.trains_all:  # the head's input is kept for the gradient of its weights
        kept = hidden if sizes.cell == 4 else tape.new(sizes.wide(sizes.shapes.hidden), ACTIVATIONS)
    head = tape.new(vocabulary * sizes.shapes.hidden * sizes.cell, WORKING) if sizes.head_is_raised else None
    logits = tape.new(sizes.wide(vocabulary), LOSS)
    capped = None
    if sizes.shapes.caps_logits:  # divided, through a tanh, which is kept, and multiplied
        divided, capped = (tape.new(sizes.wide(vocabulary), LOSS) for _ in range(2))
        tape.free(logits, divided)
        logits = tape.new(sizes.wide(vocabulary), LOSS)
    wide = tape.new(sizes.wide(vocabulary, 4), LOSS) if sizes.cell != 4 else None
    logarithm = tape.new(sizes.wide(vocabulary, 4), LOSS)
    tape.free(wide, *cast)
    returned = tape.new(sizes.wide(vocabulary, 4), LOSS) if sizes.cell != 4 else None
    tape.free(logits, returned, None if kept == hidden else hidden)
    of_logarithm = tape.new(sizes.wide(vocabulary, 4), LOSS)
    of_wide = tape.new(sizes.wide(vocabulary, 4), LOSS)
    tape.free(logarithm, of_logarithm)
    of_logits = tape.new(sizes.wide(vocabulary), LOSS) if sizes.cell != 4 else None
    if of_logits is not None:
        tape.free(of_wide)
    of_head = of_wide if of_logits is None else of_logits
    if capped is not None:
        of_capped, of_divided = (tape.new(sizes.wide(vocabulary), LOSS) for _ in range(2))
        tape.free(of_head, of_capped, capped)
        of_head = of_divided
    gradient = tape.new(sizes.wide(sizes.shapes.hidden, sizes.stream), WORKING)
    if sizes.trains_all:
        weight_gradient(tape, sizes, vocabulary * sizes.shapes.hidden, is_whole=not sizes.shapes.is_tied)
    tape.free(head, of_head, kept)
    return gradient


def chunked_loss(tape: Tape, sizes: Sizes, hidden: int, compiled: bool, liger: bool) -> int:
    """Write a loss in chunks, whose gradient is known in the forward; return the gradient of `hidden`, which ends."""
    vocabulary, width = sizes.shapes.vocabulary, sizes.shapes.hidden
    head = tape.new(vocabulary * width * sizes.cell, WORKING) if sizes.head_is_raised else None
    gradient = tape.new(sizes.wide(width), ACTIVATIONS)
    if liger:
        rows = min(sizes.tokens, liger_chunk_rows(sizes.tokens, vocabulary, width))
        # its kernel writes the gradient over the logits
        tape.free(tape.new(rows * vocabulary * sizes.cell, LOSS), head, hidden)
        return gradient
    rows = chunk_rows(sizes.tokens, vocabulary, width if compiled else 0, sizes.config.engine.mlp_tile)
    summed = _summed(tape, sizes, vocabulary * width, -(-sizes.tokens // rows)) if sizes.trains_all else None
    count, each = (2, sizes.cell) if compiled else (4, 4)
    *chunk, of_logits = [tape.new(rows * vocabulary * each, LOSS) for _ in range(count)]
    tape.free(*chunk)
    if summed is not None and tape.sizes[summed] == 4 * vocabulary * width:  # a chunk's share is added to it
        tape.free(tape.new(vocabulary * width * sizes.cell, WORKING))
    tape.free(of_logits, head, hidden)
    if summed is not None:
        _scaled(tape, sizes, vocabulary * width, summed)
    wide = tape.new(sizes.wide(width, 4), WORKING)
    product = tape.new(sizes.wide(width, 4), WORKING)
    tape.free(wide)
    out = tape.new(sizes.wide(width, sizes.stream), WORKING)
    tape.free(gradient, product)
    return out


def _summed(tape: Tape, sizes: Sizes, weights: int, chunks: int) -> int:
    """Begin the sum of a trained head's gradient."""
    each = 2 if sizes.config.precision.dtype is DType.bf16 and chunks <= _SUMMED_IN_BF16 else 4
    is_last = each == sizes.cell == other_bytes(sizes.config)
    return tape.new(each * weights, _part(sizes) if is_last else WORKING)


def _scaled(tape: Tape, sizes: Sizes, weights: int, summed: int) -> None:
    """Scale that sum, and bring it into the products' format and then into the weights'."""
    tape.free(tape.new(4 * min(_PIECE, weights), WORKING))
    held, each = other_bytes(sizes.config), tape.sizes[summed] // weights
    formats = [each, *([sizes.cell] if each != sizes.cell else []), *([held] if held != sizes.cell else [])]
    for place, size in enumerate(formats[1:], 2):
        other = tape.new(size * weights, _part(sizes) if place == len(formats) else WORKING)
        tape.free(summed)
        summed = other
    if _part(sizes) == WORKING:
        tape.free(summed)


def _part(sizes: Sizes) -> str:
    """Return what the head's gradient belongs to: it stays until the optimizer has taken it, or ends at once."""
    return WORKING if gradient_ends(sizes, is_whole=not sizes.shapes.is_tied) else GRADIENTS
