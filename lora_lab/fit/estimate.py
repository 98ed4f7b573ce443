"""Estimate a trial's memory: what is held at the moment at which most is held, part by part."""

from collections import Counter
from dataclasses import dataclass

from lora_lab.config import TrialConfig
from lora_lab.options import EngineKind
from lora_lab.fit.compiled_step import compiled_step, graph_copies
from lora_lab.fit.plain_step import plain_step
from lora_lab.fit.shapes import Shapes
from lora_lab.fit.step import ADAPTERS, GRADIENTS, OPTIMIZER, WEIGHTS, WORKING, sizes_of
from lora_lab.fit.tape import Tape
from lora_lab.fit.weights import adapter_sizes, frozen_bytes, optimizer_state


def allocated(config: TrialConfig, shapes: Shapes):
    sizes = sizes_of(config, shapes)
    tape = Tape()
    each = adapter_sizes(config.method, shapes)
    trained = shapes.layers * sum(each)
    state = optimizer_state(config.optimizer, each)
    kind = config.engine.kind
    tape.new(3 * 2**25, WORKING)
    tape.new(frozen_bytes(config, shapes), WEIGHTS)
    tape.new(4 * trained, ADAPTERS)
    tape.new(shapes.layers * (state.total - state.paged), OPTIMIZER)
    if kind is EngineKind.graph:
        tape.new(8 * trained, GRADIENTS)
        tape.new(graph_copies(sizes, shapes), WORKING)
    elif config.grad_accum_steps > 1:
        tape.new(4 * trained, GRADIENTS)
    if kind in (EngineKind.compile, EngineKind.graph):
        compiled_step(tape, sizes)
    else:
        plain_step(tape, sizes)
    last = tape.new(shapes.layers * state.working, WORKING)
    tape.free(last, *(n for n, part in enumerate(tape.parts) if part == GRADIENTS and n > 4))
    return tape.peak()
