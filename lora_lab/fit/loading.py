"""Write on a tape what loading leaves on the card: weights one after the other, adapters, and an engine's own copies.
Embeddings that are kept in host memory are loaded too, and leave the card when the adapters are there. Layers that are
kept there leave it weight by weight.

transformers loads weights in the order of their names: the head, the embeddings, then of each layer the feed-forward
part before attention, and each part in alphabetical order (core_model_loading.dot_natural_key). The order matters for
the allocator: where weights are quantised or stacked, what they were made from leaves gaps. Of a mixture in 4 bit it
matters more: all its experts are there in 16 bit, before the first of them goes to 4 bit.
"""

from dataclasses import replace

from lora_lab.fit.optimizer import trained_weights
from lora_lab.fit.shapes import Linear
from lora_lab.fit.step import ADAPTERS, GRADIENTS, WEIGHTS, WORKING, Sizes
from lora_lab.fit.tape import Tape
from lora_lab.fit.weights import BLOCK, linear_bytes, other_bytes, trains_all, weight_bytes
from lora_lab.options import EngineKind, Weights

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
    tables = [tape.new(table * other_bytes(config), WEIGHTS) for _ in range(1 if shapes.is_tied else 2)]
    layers: list[dict[Linear, list[int]]] = []
    hosted = config.engine.hosted_layers(shapes.layers)
    experts = []
    feed_forward = (*shapes.gate_up, *shapes.down)
    named = sorted(shapes.linears, key=lambda linear: (linear not in feed_forward, linear.name))
    for number in range(shapes.layers):
        experts += _load_experts(tape, sizes)
        layers.append({linear: _load_linear(tape, sizes, linear, number < hosted) for linear in named})
    tape.new(shapes.small_weights * (4 if config.method.raise_to_fp32 else other_bytes(config)), WEIGHTS)
    _quantise_experts(tape, sizes, experts)
    for _ in range(_THREADS * (2 if tries_out else 1)):
        tape.new(_WORKSPACE, WORKING)
    trained = trained_weights(config.method, shapes)
    held = trained_weights(replace(config.method, freeze_a=False), shapes)
    for size in [] if trains_all(config.method) else held.sizes:  # all weights are there already
        tape.new(4 * size, ADAPTERS)
    if config.engine.hosts_embeddings(shapes.is_tied) and not trains_all(config.method):
        tape.free(tables[-1])
    if config.engine.kind is EngineKind.graph:
        _stack(tape, sizes, layers)
        tape.new(4 * trained.elements, GRADIENTS)  # of a micro-batch
    if config.grad_accum_steps > 1:
        each = other_bytes(config) if trains_all(config.method) else 4
        tape.new(each * trained.elements, GRADIENTS)  # their sum
    tape.has_own_pool = config.engine.kind is EngineKind.graph
    tape.is_recorded = tape.has_own_pool and not tries_out
    tape.returns_cached = True


def _load_linear(tape: Tape, sizes: Sizes, linear: Linear, is_hosted: bool) -> list[int]:
    """Return what stays on the card: weights and scales, or the scales alone."""
    whole = tape.new(linear.weights * sizes.cell, WEIGHTS) if sizes.quantised else None
    stored = [tape.new(size, WEIGHTS) for size in linear_bytes(linear, sizes.config)]
    if is_hosted:
        tape.free(stored.pop(0))
    tape.free(whole)
    return stored


def _load_experts(tape: Tape, sizes: Sizes) -> list[int]:
    """Begin a layer's stacked weights. Random ones are made with the layer's other stack next to them (see
    worker/random_weights.py), others are put together from each expert's."""
    experts = sizes.shapes.experts
    if experts is None:
        return []
    each = sizes.cell if sizes.quantised else other_bytes(sizes.config)
    stored = []
    for stack, other in zip(experts.stacks, reversed(experts.stacks), strict=True):
        beside = other if sizes.config.model.weights is Weights.random else stack
        parts = tape.new(experts.count * beside.weights * sizes.cell, WORKING)
        stored.append(tape.new(experts.count * stack.weights * each, WEIGHTS))
        tape.free(parts)
    return stored


def _quantise_experts(tape: Tape, sizes: Sizes, stored: list[int]) -> None:
    """Put stacked weights into 4 bit, one after the other."""
    for whole in stored if sizes.quantised else ():
        scales = [tape.new(4 * tape.sizes[whole] // sizes.cell // BLOCK, WORKING) for _ in range(2)]
        tape.free(*scales)
        for size in weight_bytes(tape.sizes[whole] // sizes.cell, sizes.config):
            tape.new(size, WEIGHTS)
        tape.free(whole)


def _stack(tape: Tape, sizes: Sizes, held: list[dict[Linear, list[int]]]) -> None:
    """Make the adapters' copies in the products' format: A stacked, each B, and B block-diagonal over the group
    (worker/engines/compute_copies.py). Then lay the weights of layers with the same input side by side, and move the
    others, decoder layer by decoder layer."""
    shapes, copies = sizes.shapes, 0
    groups: list[list[Linear]] = []
    for group in (shapes.qkv, (shapes.output,), shapes.gate_up, shapes.down):
        linears = [linear for linear in group if linear is not None and sizes.has_adapter(linear)]
        copies += sum(sizes.rank * (linear.inputs + linear.outputs) for linear in linears)
        if len(linears) > 1 and sizes.rank * len(linears) <= MOST_RANKS:
            copies += sum(linear.outputs for linear in linears) * sizes.rank * len(linears)
            groups.append(linears)
        else:
            groups += [[linear] for linear in linears]
    tape.new(shapes.layers * copies * sizes.cell, WORKING)
    for layer in held:
        for linears in groups:
            for parts in zip(*(layer[linear] for linear in linears), strict=True):
                tape.new(sum(tape.sizes[part] for part in parts), WEIGHTS)
                tape.free(*parts)
