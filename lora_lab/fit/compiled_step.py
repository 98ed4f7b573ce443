"""Write a whole training step of engines compile and graph on a tape."""

from lora_lab.fit.compiled_layer import CompiledLayer, CompiledSaved
from lora_lab.fit.loss import chunked_loss, whole_loss
from lora_lab.fit.step import ACTIVATIONS, WORKING, Sizes, checkpoints, embeddings_gradient, mask_bytes
from lora_lab.fit.tape import Tape
from lora_lab.options import Checkpointing, EngineKind


def compiled_step(tape: Tape, sizes: Sizes) -> None:
    """Write forward, loss and backward of one micro-batch."""
    config, shapes = sizes.config, sizes.shapes
    mode = config.gradient_checkpointing
    layer = CompiledLayer(tape, sizes, config.engine.kind is EngineKind.graph)
    stream = tape.new(sizes.wide(shapes.hidden, sizes.stream), ACTIVATIONS)
    mask = tape.new(mask_bytes(sizes), ACTIVATIONS) if sizes.is_masked else None
    kept: list[tuple[int | None, CompiledSaved | None]] = []
    for number in range(shapes.layers):
        if not checkpoints(mode, number):
            saved = layer.forward(stream)
            assert saved.output is not None
            kept.append((None, saved))
            stream = saved.output
            continue
        output = layer.forward_alone()
        is_offloaded = mode is Checkpointing.offloaded and number < shapes.layers - 1
        kept.append((None if is_offloaded else stream, None))
        if is_offloaded:
            tape.free(stream)
        stream = output
    hidden = tape.new(sizes.wide(shapes.hidden, sizes.stream), ACTIVATIONS)
    if config.engine.chunked_loss:
        gradient = chunked_loss(tape, sizes, hidden, compiled=True, liger=False)
    else:
        gradient = whole_loss(tape, sizes, hidden)
    tape.free(stream)
    arriving: int | None = None
    for number in reversed(range(shapes.layers)):
        held, once = kept[number]
        if once is None and held is None:
            held = arriving if arriving is not None else _bring(tape, sizes)
        is_next_away = number > 0 and kept[number - 1] == (None, None)
        arriving = _bring(tape, sizes) if is_next_away else None
        if once is None:
            assert held is not None
            again = layer.forward(held, again=True)
            tape.free(again.output)
            gradient = layer.backward(again, gradient)
        else:
            gradient = layer.backward(once, gradient)
    if sizes.trains_all:
        embeddings_gradient(tape, sizes)
    tape.free(gradient, mask, *layer.gradients)


def _bring(tape: Tape, sizes: Sizes) -> int:
    """Begin a layer's input that comes back from host memory."""
    return tape.new(sizes.wide(sizes.shapes.hidden, sizes.stream), WORKING)
