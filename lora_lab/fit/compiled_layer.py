"""The allocations of a decoder layer that torch.compile runs: engines compile and graph.

What is kept for the backward is known: the inputs of products and of norms, what attention keeps, gate and up. In
between, compiled code keeps almost nothing. Under graph a weight and its adapter are one product, see
worker/engines/fused_lora.py, and layers with the same input are unpacked together.
"""

from dataclasses import dataclass, field

from lora_lab.fit.shapes import Linear
from lora_lab.fit.step import (
    ACTIVATIONS,
    GRADIENTS,
    WORKING,
    Sizes,
    adapter_gradients,
    attention_backward,
    attention_bytes,
    gradient_ends,
)
from lora_lab.fit.tape import Tape
from lora_lab.fit.tiles import mlp_sums, over_tiles, tile_of
from lora_lab.fit.weights import other_bytes


@dataclass(slots=True)
class CompiledSaved:
    """What a layer's forward keeps for its backward, by tensor number."""

    layer_input: int
    attention_input: int
    attention: list[int]
    middle: int
    """The stream between attention and MLP."""
    mlp_input: int
    mlp: "CompiledMlp | None"
    """None for an MLP in tiles, which keeps its input alone."""
    output: int | None
    """None where a layer that is calculated once more ends before its MLP, or before the MLP's last product."""
    low: list[int] = field(default_factory=list)
    """The adapters' inner results."""
    mlp_output: int | None = None
    """Where a norm behind an MLP in tiles keeps it."""


@dataclass(slots=True)
class CompiledMlp:
    """What an MLP's forward keeps besides its input, by tensor number."""

    gate_up: list[int]
    product: int
    low: list[int]


class CompiledLayer:
    """A decoder layer; forward and backward write on a tape."""

    def __init__(self, tape: Tape, sizes: Sizes, is_graph: bool, is_tile: bool = False) -> None:
        """Begin nothing yet.

        Args:
            is_tile: True for one that stands for a tile of another's MLP.
        """
        self.tape, self.sizes, self.is_graph = tape, sizes, is_graph
        self.gradients: list[int] = []
        """Of the adapters, under graph: the caller ends them."""
        self._of_weights: list[int] = []
        """Of weights that are trained, where they end with the layer's backward."""
        tile = None if is_tile else tile_of(sizes)
        self._tile = None if tile is None else CompiledLayer(tape, tile, is_graph, is_tile=True)

    def forward(self, layer_input: int, again: bool = False) -> CompiledSaved:
        """Begin what a forward keeps, and its output.

        Args:
            again: True in a layer that is calculated once more.
        """
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        low: list[int] = []
        x = t.new(s.wide(shapes.hidden), ACTIVATIONS)
        attention = self._attention(self._products(shapes.qkv, low))
        attended = self._products((shapes.output,), low)
        middle = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        mlp_input = t.new(s.wide(shapes.hidden), ACTIVATIONS)
        t.free(*attended)
        saved = CompiledSaved(layer_input, x, attention, middle, mlp_input, None, None, low)
        has_norm_behind = shapes.layer_norms == 4
        is_last_needed = not again or has_norm_behind
        if self._tile is not None and not is_last_needed:
            return saved
        if self._tile is None:
            if not is_last_needed:
                saved.mlp = self._mlp_again()
                saved.low += saved.mlp.low
                return saved
            saved.mlp, down = self.mlp()
            saved.low += saved.mlp.low
        else:
            down = self._tiles_forward(self._tile)
        saved.output = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        if self._tile is not None and has_norm_behind:
            saved.mlp_output = down
        else:
            t.free(down)
        return saved

    def mlp(self) -> tuple[CompiledMlp, int]:
        """Begin what an MLP keeps, and its output."""
        kept = self._gate_and_up()
        [down] = self._products(self.sizes.shapes.down, kept.low)
        return kept, down

    def _mlp_again(self) -> CompiledMlp:
        """Begin what an MLP keeps, without its last product."""
        kept = self._gate_and_up()
        kept.low += self._low(self.sizes.shapes.down)
        return kept

    def _gate_and_up(self) -> CompiledMlp:
        low: list[int] = []
        gate_up = self._products(self.sizes.shapes.gate_up, low)
        return CompiledMlp(gate_up, self.tape.new(self.sizes.wide(self.sizes.shapes.intermediate), ACTIVATIONS), low)

    def _tiles_forward(self, tile: "CompiledLayer") -> int:
        """Run the MLP's tiles; begin their output."""

        def run() -> int:
            kept, down = tile.mlp()
            tile.tape.free(*kept.gate_up, kept.product, *kept.low)
            return down

        s = self.sizes
        return over_tiles(self.tape, s, tile.sizes, s.wide(s.shapes.hidden), ACTIVATIONS, run)

    def forward_alone(self) -> int:
        """Run a forward that keeps nothing; return its output."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        low: list[int] = []
        x = t.new(s.wide(shapes.hidden), ACTIVATIONS)
        heads = self._products(shapes.qkv, low)
        t.free(x)
        attention = self._attention(heads)
        attended = self._products((shapes.output,), low)
        t.free(*attention)
        middle = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        mlp_input = t.new(s.wide(shapes.hidden), ACTIVATIONS)
        t.free(*attended)
        if self._tile is None:
            gate_up = self._products(shapes.gate_up, low)
            t.free(mlp_input)
            product = t.new(s.wide(shapes.intermediate), ACTIVATIONS)
            t.free(*gate_up)
            [down] = self._products(shapes.down, low)
            t.free(product)
        else:
            down = self._tiles_forward(self._tile)
            t.free(mlp_input)
        t.free(*low)
        output = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        t.free(middle, down)
        return output

    def _attention(self, heads: list[int]) -> list[int]:
        """Begin what attention keeps: q and k after their rotation, and before their norms in families that have some;
        v, and what `attention_bytes` says."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        kept = [t.new(s.wide(width), ACTIVATIONS) for width in (shapes.query_width, shapes.key_width)]
        if len(heads) == 1:
            kept.append(t.new(s.wide(shapes.key_width), ACTIVATIONS))
            t.free(*heads)
        else:
            kept.append(heads[2])
            t.free(*heads[:2])
        kept += [t.new(size, ACTIVATIONS) for size in attention_bytes(s)]
        if shapes.head_norm_weights:
            kept.append(t.new(s.wide(shapes.query_width + shapes.key_width), ACTIVATIONS))
        if shapes.layer_norms == 4:
            kept.append(t.new(s.wide(shapes.hidden), ACTIVATIONS))
        return kept

    def _products(self, linears: tuple[Linear, ...], low: list[int]) -> list[int]:
        """Begin the outputs of layers that share an input."""
        t, s = self.tape, self.sizes
        low += self._low(linears)
        working = self._working(linears, linears[0].inputs, sum(linear.outputs for linear in linears))
        outputs = [t.new(s.wide(linear.outputs), ACTIVATIONS) for linear in linears]
        t.free(*working)
        return outputs

    def _low(self, linears: tuple[Linear, ...]) -> list[int]:
        """Begin the adapters' inner results."""
        t, s = self.tape, self.sizes
        return [t.new(s.wide(s.rank), ACTIVATIONS) for linear in linears if s.has_adapter(linear)]

    def _working(self, linears: tuple[Linear, ...], inputs: int, outputs: int) -> list[int]:
        """Begin what a product needs: weights unpacked from 4 bit, all of them at once under graph. Where graph widens
        the product by the adapter's columns, its input and a weight in 16 bit are copied."""
        t, s = self.tape, self.sizes
        each = [linear.weights * s.cell for linear in linears]
        ranks = s.rank * sum(s.has_adapter(linear) for linear in linears)
        is_wide = self.is_graph and _widens(s.tokens, inputs, outputs, ranks)
        copied = [t.new(s.wide(inputs + ranks), WORKING)] if is_wide else []
        if s.trains_all and other_bytes(s.config) != s.cell:  # autocast
            copied.append(t.new(max(each), WORKING))
        if s.quantised or is_wide:
            copied.append(t.new(sum(each) if self.is_graph else max(each), WORKING))
        return copied

    def backward(self, saved: CompiledSaved, gradient: int) -> int:
        """End what the forward kept; return the gradient of the layer's input, which has taken `gradient`'s place."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        if saved.mlp is not None:
            grad_x = self.mlp_backward(saved.mlp)
        else:
            assert self._tile is not None
            grad_x = self._tiles_backward(self._tile, saved)
        t.free(saved.mlp_input)
        # the attention half is compiled by itself then, and autograd holds what it hands over until it returns
        held = () if self._tile is None else (grad_x, gradient)
        gradient = self._norm_backward(grad_x, gradient, ends=self._tile is None)
        t.free(saved.middle)
        grad_attended = self._products_backward((shapes.output,))
        grads = [t.new(s.wide(linear.outputs), WORKING) for linear in shapes.qkv]
        t.free(*attention_backward(t, s), grad_attended, *saved.attention)
        grad_x = self._products_backward(shapes.qkv)
        t.free(*grads, saved.attention_input, *saved.low)
        gradient = self._norm_backward(grad_x, gradient)
        t.free(saved.layer_input, *held, *self._of_weights)
        self._of_weights.clear()
        return gradient

    def mlp_backward(self, kept: CompiledMlp) -> int:
        """End what an MLP kept, but for the adapters' inner results; return the gradient of its input."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        grad_product = self._products_backward(shapes.down)
        ended = [kept.product, grad_product, *kept.gate_up]
        if self.is_graph:
            t.free(kept.product)
            ended.remove(kept.product)
        grads = [t.new(s.wide(linear.outputs), WORKING) for linear in shapes.gate_up]
        if self.is_graph:
            t.free(*ended)
        grad_x = self._products_backward(shapes.gate_up)
        if not self.is_graph:  # measured: nothing of the MLP ends before its backward is over
            t.free(*ended)
        t.free(*grads)
        return grad_x

    def _tiles_backward(self, tile: "CompiledLayer", saved: CompiledSaved) -> int:
        """Calculate the MLP's tiles once more and go back through them; return the gradient of its input."""
        t, s = self.tape, self.sizes
        grad_mlp_output = None
        if saved.mlp_output is not None:
            grad_mlp_output = t.new(s.wide(s.shapes.hidden), WORKING)
            t.free(saved.mlp_output)

        def run() -> int:
            kept, down = tile.mlp()
            found = tile.mlp_backward(kept)
            t.free(down, *kept.low)
            return found

        sums = t.new(mlp_sums(s), WORKING)
        grad_x = over_tiles(t, s, tile.sizes, s.wide(s.shapes.hidden), WORKING, run)
        t.free(sums, grad_mlp_output)
        self.gradients += tile.gradients
        tile.gradients.clear()
        return grad_x

    def _products_backward(self, linears: tuple[Linear, ...]) -> int:
        """Begin the gradient of the input that layers share, and those of their adapters."""
        t, s = self.tape, self.sizes
        scaled = []
        for linear in (linear for linear in linears if s.has_adapter(linear)):
            if self.is_graph:  # in the products' format, until the step copies them into its buffer
                self.gradients.append(t.new(s.cell * s.rank * (linear.inputs + linear.outputs), WORKING))
            else:
                adapter_gradients(t, s, linear)
                scaled.append(t.new(s.wide(linear.outputs), WORKING))
        self._weight_gradients(linears)
        inputs = linears[0].inputs
        working = self._working(linears, sum(linear.outputs for linear in linears), inputs)
        found = t.new(s.wide(inputs), WORKING)
        t.free(*working, *scaled)
        return found

    def _weight_gradients(self, linears: tuple[Linear, ...]) -> None:
        """Begin the gradients of trained weights. The layer's backward is one call, which returns them all at once."""
        t, s = self.tape, self.sizes
        held = other_bytes(s.config)
        for linear in linears if s.trains_all else ():
            narrow = t.new(s.cell * linear.weights, WORKING) if s.cell != held else None
            if gradient_ends(s, is_whole=True):
                self._of_weights.append(t.new(held * linear.weights, WORKING))
            else:
                t.new(held * linear.weights, GRADIENTS)
            t.free(narrow)

    def _norm_backward(self, grad_x: int, gradient: int, ends: bool = True) -> int:
        t, s = self.tape, self.sizes
        out = t.new(s.wide(s.shapes.hidden, s.stream), WORKING)
        t.free(*((grad_x, gradient) if ends else ()))
        return out


def _widens(rows: int, inputs: int, outputs: int, ranks: int) -> bool:
    """Return what `widens` in worker/engines/fused_lora.py does, which cannot be imported without torch."""
    return ranks > 0 and ranks % 8 == 0 and rows * outputs > rows * inputs + inputs * outputs
