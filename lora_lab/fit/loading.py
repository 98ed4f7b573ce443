"""Write on a tape what loading leaves on the card: weights one after the other, adapters, and an engine's own copies.

The order matters for the allocator alone. Where weights are quantised or stacked, what they were made from leaves gaps.
"""

from lora_lab.fit.shapes import Linear
from lora_lab.fit.step import ADAPTERS, GRADIENTS, WEIGHTS, WORKING, Sizes
from lora_lab.fit.tape import Tape
from lora_lab.fit.weights import adapter_sizes, linear_bytes, other_bytes
from lora_lab.options import EngineKind

_WORKSPACE, _THREADS = 2**25, 2
"""cuBLAS takes 32 MiB of torch's memory on Hopper cards for each thread and stream that multiplies: the forward's
thread and the backward's. Smaller cards take less."""
MOST_RANKS = 128
"""As worker/engines/fused_lora_layers.py has it: layers with more ranks together are not calculated as one."""


def load(tape: Tape, sizes: Sizes, tries_out: bool = False) -> None:
    """Write everything that stays on the card from before the first step, but the optimizer's state.

    Args:
        tries_out: whether graph runs steps before it records, on a stream with workspaces of its own.
    """
    config, shapes = sizes.config, sizes.shapes
    table = shapes.vocabulary * shapes.hidden
    tape.new(table * other_bytes(config), WEIGHTS)
    held = [[_load_linear(tape, sizes, linear) for linear in shapes.linears] for _ in range(shapes.layers)]
    if not shapes.is_tied:
        tape.new(table * other_bytes(config), WEIGHTS)
    tape.new(shapes.small_weights * (4 if config.method.raise_to_fp32 else other_bytes(config)), WEIGHTS)
    for _ in range(_THREADS * (2 if tries_out else 1)):
        tape.new(_WORKSPACE, WORKING)
    each = adapter_sizes(config.method, shapes)
    for size in each * shapes.layers:
        tape.new(4 * size, ADAPTERS)
    trained = 4 * shapes.layers * sum(each)
    if config.engine.kind is EngineKind.graph:
        _stack(tape, sizes, held)
        tape.new(trained, GRADIENTS)  # of a micro-batch
        tape.new(trained, GRADIENTS)  # handed to the optimizer
    elif config.grad_accum_steps > 1:
        tape.new(trained, GRADIENTS)
    tape.has_own_pool = config.engine.kind is EngineKind.graph
    tape.returns_cached = config.engine.kind in (EngineKind.compile, EngineKind.graph)


def _load_linear(tape: Tape, sizes: Sizes, linear: Linear) -> list[int]:
    whole = tape.new(linear.weights * sizes.cell, WEIGHTS) if sizes.quantised else None
    stored = [tape.new(size, WEIGHTS) for size in linear_bytes(linear, sizes.config)]
    tape.free(whole)
    return stored


def _stack(tape: Tape, sizes: Sizes, held: list[list[list[int]]]) -> None:
    """Lay the weights of layers with the same input side by side, and make the adapters' copies in the products'
    format: A stacked, each B, and B block-diagonal over the group (worker/engines/compute_copies.py)."""
    shapes = sizes.shapes
    copies = 0
    for group in (shapes.qkv, (shapes.output,), shapes.gate_up, (shapes.down,)):
        places = [place for place, linear in enumerate(shapes.linears) if linear in group and sizes.has_adapter(linear)]
        linears = [shapes.linears[place] for place in places]
        copies += sum(sizes.rank * (linear.inputs + linear.outputs) for linear in linears)
        if len(linears) < 2 or sizes.rank * len(linears) > MOST_RANKS:
            continue
        copies += sum(linear.outputs for linear in linears) * sizes.rank * len(linears)
        for layer in held:
            for parts in zip(*(layer[place] for place in places), strict=True):
                tape.new(sum(tape.sizes[part] for part in parts), WEIGHTS)
                tape.free(*parts)
    tape.new(shapes.layers * copies * sizes.cell, WORKING)
