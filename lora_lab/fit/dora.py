"""What DoRA adds to a linear layer with an adapter, from PEFT's code.

Its norm needs the weight with the adapter in it. PEFT multiplies the adapter's matrices by sending an identity matrix
through them, so a copy of inputs x inputs numbers exists as well. The magnitude is in fp32, and so is all that is
multiplied with it. A 4-bit layer's output then stays in fp32, and with it the stream between the layers.
"""

from lora_lab.fit.shapes import Linear
from lora_lab.fit.step import ACTIVATIONS, WORKING, Sizes
from lora_lab.fit.tape import Tape


def merged_weight(tape: Tape, sizes: Sizes, linear: Linear) -> list[int]:
    """Begin what the norm is calculated from; return what stays until the layer's output is there."""
    t, s = tape, sizes
    each = s.stream if s.quantised else 4
    identity = t.new(4 * linear.inputs**2, WORKING)
    stays = [identity] if s.cell == 4 else [t.new(s.cell * linear.inputs**2, WORKING)]
    product = t.new(s.cell * linear.weights, WORKING)
    t.free(identity if s.cell != 4 else None)
    stays.append(_converted(t, product, each * linear.weights))
    if s.quantised:
        stays.append(_converted(t, t.new(s.cell * linear.weights, WORKING), each * linear.weights))
    elif s.cell != each:
        stays.append(t.new(each * linear.weights, WORKING))
    t.free(*[t.new(each * linear.weights, WORKING) for _ in range(2)])
    return stays


def scaled_output(tape: Tape, sizes: Sizes, linear: Linear) -> int:
    """Begin the layer's output out of its base's and its adapter's, which are both kept by the caller."""
    t, wide = tape, sizes.wide(linear.outputs, 4)
    base, magnified, scaled = (t.new(wide, WORKING) for _ in range(3))
    t.free(magnified)
    both = t.new(wide, WORKING)
    t.free(base, scaled)
    result = t.new(wide, ACTIVATIONS)
    t.free(both)
    return result if sizes.quantised else _converted(t, result, sizes.wide(linear.outputs), ACTIVATIONS)


def output_backward(tape: Tape, sizes: Sizes, linear: Linear, base: int, high: int) -> tuple[int, int]:
    """End the outputs of base and adapter; return their gradients. The gradient of the layer's output stays."""
    t, s = tape, sizes
    wide, narrow = s.wide(linear.outputs, 4), s.wide(linear.outputs)
    copies = [] if s.quantised or s.cell == 4 else [t.new(wide, WORKING), t.new(narrow, WORKING)]
    scaled, of_magnitude, magnified = (t.new(wide, WORKING) for _ in range(3))
    t.free(of_magnitude)
    of_high = _converted(t, magnified, narrow) if s.cell != 4 else magnified
    t.free(scaled, high)
    of_magnitude, of_base = (t.new(wide, WORKING) for _ in range(2))
    t.free(of_magnitude)
    if copies:
        of_base = _converted(t, of_base, narrow)
        t.free(copies[0])
    t.free(base)
    both = t.new(s.wide(linear.outputs, s.stream), WORKING)
    t.free(of_base, *copies[1:])
    return both, of_high


def _converted(tape: Tape, number: int, size: int, part: str = WORKING) -> int:
    """Convert a tensor to another format: the copy is there before the tensor ends."""
    if tape.sizes[number] == size:
        return number
    copy = tape.new(size, part)
    tape.free(number)
    return copy
