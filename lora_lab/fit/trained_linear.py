"""What a linear layer takes whose own weights are trained: transformers under autocast."""

from lora_lab.fit.saved import Product
from lora_lab.fit.shapes import Linear
from lora_lab.fit.step import ACTIVATIONS, WORKING, Sizes, weight_gradient
from lora_lab.fit.tape import Tape
from lora_lab.fit.weights import other_bytes


def casts_input(sizes: Sizes, linear: Linear) -> bool:
    """Return whether the layer saves its input as a copy in the products' format: behind a norm, where autocast makes
    one for each layer."""
    return sizes.stream != sizes.cell and not _is_before_stream(sizes, linear)


def _is_before_stream(sizes: Sizes, linear: Linear) -> bool:
    return linear is sizes.shapes.output or linear in sizes.shapes.down


def trained_output(tape: Tape, sizes: Sizes, linear: Linear, kept: Product) -> int:
    """Begin what the layer keeps, and its output."""
    if casts_input(sizes, linear):
        kept.own_input.append(tape.new(sizes.wide(linear.inputs), ACTIVATIONS))
    if other_bytes(sizes.config) != sizes.cell:
        kept.copies.append(tape.new(linear.weights * sizes.cell, WORKING))
    return tape.new(sizes.wide(linear.outputs), ACTIVATIONS)


def trained_backward(tape: Tape, sizes: Sizes, linear: Linear, kept: Product) -> int:
    """Begin the gradient of the weights, and end what was kept; return the gradient of the input."""
    narrow_output = None
    if sizes.stream != sizes.cell and _is_before_stream(sizes, linear):
        narrow_output = tape.new(sizes.wide(linear.outputs), WORKING)
    found = tape.new(sizes.wide(linear.inputs), WORKING)
    weight_gradient(tape, sizes, linear.weights)
    tape.free(narrow_output, *kept.own_input, *kept.copies)
    if casts_input(sizes, linear):
        wide = tape.new(sizes.wide(linear.inputs, sizes.stream), WORKING)
        tape.free(found)
        found = wide
    return found
