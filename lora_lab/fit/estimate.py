"""Estimate a trial's memory: what is held at the moment at which most is held, part by part."""

from collections import Counter
from dataclasses import dataclass

from lora_lab.config import TrialConfig
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
    tape.new(2**26, WORKING)
    tape.new(frozen_bytes(config, shapes), WEIGHTS)
    tape.new(4 * trained, ADAPTERS)
    tape.new(shapes.layers * (state.total - state.paged), OPTIMIZER)
    if config.grad_accum_steps > 1:
        tape.new(4 * trained, GRADIENTS)
    plain_step(tape, sizes)
    tape.new(shapes.layers * state.working, WORKING)
    return tape.peak()
