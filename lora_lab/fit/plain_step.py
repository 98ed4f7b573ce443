"""Write a whole training step of engines eager and liger on a tape."""

from lora_lab.fit.loss import chunked_loss, whole_loss
from lora_lab.fit.plain_layer import PlainLayer
from lora_lab.fit.saved import Saved
from lora_lab.fit.step import ACTIVATIONS, WORKING, Sizes, checkpoints, embeddings_gradient, mask_bytes
from lora_lab.fit.tape import Tape
from lora_lab.options import Checkpointing, EngineKind


def plain_step(tape: Tape, sizes: Sizes) -> None:
    """Write forward, loss and backward of one micro-batch."""
    config, shapes = sizes.config, sizes.shapes
    liger, mode = config.engine.kind is EngineKind.liger, config.gradient_checkpointing
    layer = PlainLayer(tape, sizes, liger)
    stream = tape.new(sizes.wide(shapes.hidden, sizes.stream), ACTIVATIONS)
    shared = [tape.new(size, ACTIVATIONS) for size in (2 * sizes.wide(shapes.head_size), mask_bytes(sizes)) if size]
    kept: list[tuple[int | None, Saved | None]] = []
    for number in range(shapes.layers):
        if not checkpoints(mode, number):
            saved = layer.forward(stream, has_gradient=number > 0 or mode is not Checkpointing.none or sizes.trains_all)
            kept.append((None, saved))
            stream = _output(saved)
            continue
        output = layer.forward_alone()
        is_offloaded = mode is Checkpointing.offloaded and number < shapes.layers - 1
        kept.append((None if is_offloaded else stream, None))
        if is_offloaded:
            tape.free(stream)
        stream = output
    final = tape.new(sizes.wide(shapes.hidden, 4), ACTIVATIONS)
    scaled = tape.new(sizes.wide(shapes.hidden, sizes.stream), ACTIVATIONS) if sizes.trains_all and not liger else None
    hidden = tape.new(sizes.wide(shapes.hidden, sizes.stream), ACTIVATIONS)
    tape.free(stream)
    if config.engine.chunked_loss:
        gradient = chunked_loss(tape, sizes, hidden, compiled=False, liger=liger)
        tape.free(*layer.cast)
    else:
        gradient = whole_loss(tape, sizes, hidden, layer.cast)
    tape.free(final, scaled)
    for held, once in reversed(kept):
        saved = once or _again(tape, sizes, layer, held)
        gradient = layer.backward(saved, gradient)
        if once is None:
            tape.free(saved.output)
    if sizes.trains_all:
        embeddings_gradient(tape, sizes)
    tape.free(gradient, *shared)


def _again(tape: Tape, sizes: Sizes, layer: PlainLayer, held: int | None) -> Saved:
    """Calculate a layer once more from its input."""
    if held is None:  # it has come back from host memory
        held = tape.new(sizes.wide(sizes.shapes.hidden, sizes.stream), WORKING)
    return layer.forward_again(held)


def _output(saved: Saved) -> int:
    assert saved.output is not None
    return saved.output
