"""The allocations of a layer's experts: transformers' grouped_mm, PEFT's adapters, weights unpacked by bitsandbytes.

Each token goes to a fixed number of experts. All their tokens lie in one tensor, sorted by expert, so its size does not
depend on which experts were chosen. Weights that are merged with an adapter or unpacked from 4 bit are made for all
experts of the layer at once, and stay until the layer's backward.
"""

from dataclasses import dataclass, field

from lora_lab.fit.shapes import Experts, Linear
from lora_lab.fit.step import ACTIVATIONS, GRADIENTS, WORKING, Sizes
from lora_lab.fit.tape import Tape
from lora_lab.fit.weights import BLOCK, adapts_experts, adapts_router

_INDEX = 8
"""Bytes of a token's number."""


@dataclass(slots=True)
class _Stack:
    """What the product with a stacked weight keeps for the backward."""

    chosen: int | None = None
    """Its input, where the weight has an adapter."""
    weight: int | None = None
    """Merged or unpacked."""
    factors: int | None = None
    """The adapter in the products' format."""
    gradients: int | None = None
    """Of the factors."""


@dataclass(slots=True)
class KeptExperts:
    """What a forward keeps for its backward, by tensor number."""

    router: list[int] = field(default_factory=list)
    gate_up: _Stack = field(default_factory=_Stack)
    mlp: list[int] = field(default_factory=list)
    """The activated gate, then gate and up."""
    down: _Stack = field(default_factory=_Stack)
    output: int | None = None

    def tensors(self) -> list[int | None]:
        """Return all of them."""
        stacks = [each for stack in (self.gate_up, self.down) for each in (stack.chosen, stack.weight, stack.factors)]
        return [*self.router, *stacks, *self.mlp, self.output]


class PlainExperts:
    """Router and experts of a layer; forward and backward write on a tape."""

    def __init__(self, tape: Tape, sizes: Sizes, experts: Experts) -> None:
        self.tape, self.sizes, self.experts = tape, sizes, experts
        self._adapts = adapts_experts(sizes.config.method)
        self._pairs = sizes.tokens * experts.chosen
        """Pairs of a token and an expert."""
        self._each = 4 if experts.weighs_in_fp32 else sizes.cell
        """Bytes of a number once the router's weight is in it."""
        self.keeps_input = adapts_router(sizes.config.method, experts)
        """Whether the router keeps the layer's input."""

    def forward(self, stops_early: bool = False) -> tuple[int, KeptExperts]:
        """Begin what is kept, and the output of shape (tokens, hidden). The input stays.

        Args:
            stops_early: a checkpointed forward that runs once more stops when all that is kept is there.
        """
        t, s, e, kept = self.tape, self.sizes, self.experts, KeptExperts()
        hidden, inner = s.shapes.hidden, e.down.inputs
        choices = t.new(s.tokens * e.count * (s.cell + 4), WORKING)
        kept.router = [t.new(4 * s.tokens * e.count, ACTIVATIONS), t.new(2 * _INDEX * self._pairs, ACTIVATIONS)]
        t.free(choices)
        self._factors(kept.down, e.down)
        self._factors(kept.gate_up, e.gate_up)
        wide = t.new(self._wide(hidden, s.stream), WORKING) if s.stream != s.cell else None
        chosen = t.new(self._wide(hidden), ACTIVATIONS)
        self._weight(kept.gate_up, e.gate_up)
        kept.mlp = [t.new(self._wide(columns), ACTIVATIONS) for columns in (2 * inner, inner)][::-1]
        product = t.new(self._wide(inner), ACTIVATIONS)
        self._weight(kept.down, e.down)
        kept.output = t.new(self._wide(hidden), ACTIVATIONS)
        if self._adapts:
            kept.gate_up.chosen, kept.down.chosen = chosen, product
        else:
            t.free(product)
        weighed = t.new(self._wide(hidden, self._each), WORKING)
        moved = None if stops_early else t.new(self._wide(hidden, self._each), WORKING)
        t.free(weighed)
        total = t.new(s.wide(hidden, self._each), WORKING)
        result = t.new(s.wide(hidden, s.stream), ACTIVATIONS)
        t.free(total, moved, wide, None if self._adapts else chosen)
        return result, kept

    def forward_alone(self) -> int:
        """Run a forward that keeps nothing; return its output. It never holds more than the forward before a
        backward, so that it is written in the same way."""
        result, kept = self.forward()
        self.tape.free(*kept.tensors())
        return result

    def spread(self) -> int:
        """Begin the gradient of each expert's output. Autograd makes it before it asks for anything that the forward
        keeps, so before a checkpointed forward runs once more."""
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        cast = t.new(s.wide(hidden, self._each), WORKING) if self._each != s.stream else None
        spread = t.new(self._wide(hidden, self._each), WORKING)
        t.free(cast)
        return spread

    def backward(self, kept: KeptExperts, spread: int) -> int:
        """End what the forward kept, and the gradient of each expert's output; return the gradient of the input."""
        t, s, e = self.tape, self.sizes, self.experts
        hidden, inner = s.shapes.hidden, e.down.inputs
        zeros, moved = (t.new(self._wide(hidden, self._each), WORKING) for _ in range(2))
        t.free(spread, zeros)
        of_output, of_weights = (t.new(self._wide(hidden, self._each), WORKING) for _ in range(2))
        narrow = t.new(self._wide(hidden), WORKING) if self._each != s.cell else None
        t.free(moved, of_weights, kept.output, of_output if narrow is not None else None)
        of_product = self._product_backward(kept.down, e.down, of_output if narrow is None else narrow)
        of_active, of_up = (t.new(self._wide(inner), WORKING) for _ in range(2))
        t.free(of_product, kept.mlp[0])
        of_gate = t.new(self._wide(inner), WORKING)
        t.free(of_active, kept.mlp[1])
        joined = t.new(self._wide(2 * inner), WORKING)
        t.free(of_up, of_gate)
        of_chosen = self._product_backward(kept.gate_up, e.gate_up, joined)
        zeros, total = (t.new(s.wide(hidden, s.stream), WORKING) for _ in range(2))
        t.free(zeros, of_chosen)
        self._adapter_gradients(kept)
        return self._router_backward(kept, total)

    def _wide(self, columns: int, each: int | None = None) -> int:
        """Return the bytes of a tensor (pairs, columns)."""
        return self._pairs * columns * (self.sizes.cell if each is None else each)

    def _factors(self, stack: _Stack, shape: Linear) -> None:
        """Copy an adapter to the products' format. PEFT registers the sum of weight and adapter, and torch calculates
        it once to see whether it fits in the weight's place."""
        if self._adapts:
            t, s = self.tape, self.sizes
            stack.factors = t.new(s.cell * self._adapter_elements(shape), WORKING)
            t.free(t.new(self._stacked(shape), WORKING))

    def _weight(self, stack: _Stack, shape: Linear) -> None:
        """Begin a weight that is merged with its adapter, or unpacked from 4 bit; else it is there."""
        t, s = self.tape, self.sizes
        scales = t.new(4 * self._stacked(shape) // s.cell // BLOCK, WORKING) if s.quantised else None
        if self._adapts or s.quantised:
            stack.weight = t.new(self._stacked(shape), WORKING)
        t.free(scales)

    def _product_backward(self, stack: _Stack, shape: Linear, gradient: int) -> int:
        """Return the gradient of a product's input; `gradient` ends."""
        t, s = self.tape, self.sizes
        of_weight = t.new(self._stacked(shape), WORKING) if self._adapts else None
        of_input = t.new(self._wide(shape.inputs), WORKING)
        t.free(gradient, stack.chosen, stack.weight)
        if self._adapts:
            stack.gradients = t.new(s.cell * self._adapter_elements(shape), WORKING)
        t.free(of_weight, stack.factors)
        return of_input

    def _adapter_gradients(self, kept: KeptExperts) -> None:
        t, s, e = self.tape, self.sizes, self.experts
        for stack, shape in ((kept.gate_up, e.gate_up), (kept.down, e.down)):
            if stack.gradients is not None:
                wide = t.new(4 * self._adapter_elements(shape), WORKING)
                if s.config.grad_accum_steps == 1:
                    t.new(4 * self._adapter_elements(shape), GRADIENTS)
                t.free(wide, stack.gradients)

    def _router_backward(self, kept: KeptExperts, total: int) -> int:
        """Add the gradient that comes through the router."""
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        choices = t.new(8 * s.tokens * self.experts.count, WORKING)
        t.free(*kept.router)
        through_router = t.new(s.wide(hidden), WORKING)
        if self.keeps_input and s.config.grad_accum_steps == 1:
            t.new(4 * s.rank * (hidden + self.experts.count), GRADIENTS)
        both = t.new(s.wide(hidden, s.stream), WORKING)
        t.free(choices, through_router, total)
        return both

    def _stacked(self, shape: Linear) -> int:
        """Return the bytes of a stacked weight in the products' format."""
        return self.experts.count * shape.weights * self.sizes.cell

    def _adapter_elements(self, shape: Linear) -> int:
        rank = self.experts.rank(shape, self.sizes.rank)
        return self.experts.count * rank * (shape.inputs + shape.outputs)
