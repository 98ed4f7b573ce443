"""The allocations of a decoder layer run operation by operation: transformers, PEFT and bitsandbytes under autocast.

Read from their code: what each operation saves for the backward, which copies autocast and PEFT make, and when each
tensor is dropped. Engine liger differs in the norms, in the MLP and in the rotation, by its kernels' code.
"""

from lora_lab.fit.dora import merged_weight, output_backward, scaled_output
from lora_lab.fit.plain_experts import KeptExperts, PlainExperts
from lora_lab.fit.plain_norms import PlainNorms
from lora_lab.fit.saved import Product, Saved
from lora_lab.fit.shapes import Linear
from lora_lab.fit.step import (
    ACTIVATIONS,
    WORKING,
    Sizes,
    adapter_gradients,
    attention_backward,
    attention_bytes,
)
from lora_lab.fit.tape import Tape
from lora_lab.fit.tiles import mlp_sums, over_tiles, tile_of
from lora_lab.fit.trained_linear import casts_input, trained_backward, trained_output
from lora_lab.options import Attention


class PlainLayer:
    """A decoder layer; forward and backward write on a tape."""

    def __init__(self, tape: Tape, sizes: Sizes, liger: bool, is_tile: bool = False) -> None:
        """Begin nothing yet.

        Args:
            is_tile: True for one that stands for a tile of another's MLP.
        """
        self.tape, self.sizes, self.liger = tape, sizes, liger
        self.cast: list[int] = []
        """Copies of trained weights in the products' format, of layers that keep nothing: the caller ends them."""
        self._casts = sizes.stream != sizes.cell
        """Whether the residual stream is wider than the products."""
        self._experts = PlainExperts(tape, sizes, sizes.shapes.experts) if sizes.shapes.experts else None
        tile = None if is_tile else tile_of(sizes)
        self._tile = None if tile is None else PlainLayer(tape, tile, liger, is_tile=True)
        self._norms = PlainNorms(tape, sizes, liger)

    def forward(self, layer_input: int, has_gradient: bool = True, stops_early: bool = False) -> Saved:
        """Begin what a forward keeps, and its output. `layer_input` is kept or ended.

        Args:
            layer_input: the tensor that the layer gets.
            has_gradient: False for the first layer where nothing before it needs a gradient.
            stops_early: a checkpointed forward that runs once more stops when all that is kept is there.
        """
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        saved = Saved()
        x = self._norms.forward(saved.norms, saved.scaled, layer_input, has_gradient)
        heads = [self._linear(linear, saved) for linear in shapes.qkv]
        saved.attention_input = self._kept_input(shapes.qkv, x)
        saved.attention = self._attention(heads)
        attended = self._linear(shapes.output, saved)
        residual = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        t.free(attended)
        self._norms.outer_forward(saved.outer)
        if not (self._norms.keeps_stream and has_gradient):
            t.free(layer_input)
        x = self._norms.forward(saved.norms, saved.scaled, residual, has_gradient=True)
        if self._tile is not None:
            saved.mlp_input = x
            if stops_early and shapes.layer_norms != 4:  # all that is kept is there
                return self._without_stream(saved, residual)
            inner = self._tiles_forward(self._tile)
        elif self._experts is None:
            inner = self._mlp(x, saved)
        else:
            inner = self._mixture(x, saved, self._experts, stops_early)
        if not (stops_early and self._experts and saved.shared is None):
            saved.output = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        t.free(inner)
        self._norms.outer_forward(saved.outer)
        return self._without_stream(saved, residual)

    def _without_stream(self, saved: Saved, residual: int) -> Saved:
        """End the stream between attention and MLP, where no norm keeps it."""
        if not self._norms.keeps_stream:
            self.tape.free(residual)
        return saved

    def _nothing_yet(self) -> Saved:
        """Return what is kept before an MLP, without anything of attention."""
        return Saved(products=[Product() for _ in (*self.sizes.shapes.qkv, self.sizes.shapes.output)])

    def _tiles_forward(self, tile: "PlainLayer") -> int:
        """Run the MLP's tiles; begin their output."""

        def run() -> int:
            kept = tile._nothing_yet()
            down = tile._mlp(tile.tape.new(0, ACTIVATIONS), kept)
            tile.tape.free(*kept.of_mlp())
            return down

        s = self.sizes
        return over_tiles(self.tape, s, tile.sizes, s.wide(s.shapes.hidden, s.stream), ACTIVATIONS, run)

    def _mlp(self, x: int, saved: Saved, ends_input: bool = True) -> int:
        """Begin what the MLP keeps, and its output; `x` is kept or ended."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        gate_up = [self._linear(linear, saved) for linear in shapes.gate_up]
        if ends_input:
            saved.mlp_input = self._kept_input(shapes.gate_up, x)
        inner = s.wide(shapes.intermediate, s.inner)
        if not self.liger:
            saved.mlp.append(t.new(inner, ACTIVATIONS))  # the activated gate
        saved.mlp += gate_up
        product = t.new(inner, ACTIVATIONS)
        [down] = (self._linear(linear, saved) for linear in shapes.down)
        saved.product = self._kept_input(shapes.down, product)
        return down

    def _mixture(self, x: int, saved: Saved, experts: PlainExperts, stops_early: bool) -> int:
        """Begin what experts keep, and the MLP next to them where there is one, and their output."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        if shapes.gate_up:
            saved.shared = self._mlp(x, saved, ends_input=False)
        output, saved.experts = experts.forward(stops_early and saved.shared is None)
        if experts.experts.shared_gate is not None:
            t.free(self._linear(experts.experts.shared_gate, saved))
            weighed = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
            both = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
            t.free(output, weighed)
            output = both
        saved.mlp_input = x if experts.keeps_input else self._kept_input(shapes.gate_up, x)
        return output

    def forward_alone(self) -> int:
        """Run a forward that keeps nothing; return its output."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        x = self._norms.forward_alone()
        heads = [self._linear_alone(linear) for linear in shapes.qkv]
        t.free(x)
        attention = self._attention(heads)
        attended = self._linear_alone(shapes.output)
        t.free(*attention)
        residual = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        t.free(attended)
        x = self._norms.forward_alone()
        shared = inner = None
        if self._tile is not None:
            inner = self._tiles_forward(self._tile)
            t.free(x)
        elif shapes.gate_up:
            shared = inner = self._mlp_alone(None if self._experts else x)
        if self._experts is not None:
            inner = self._experts.forward_alone()
            t.free(x, shared)
        output = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        t.free(inner, residual)
        return output

    def _mlp_alone(self, x: int | None) -> int:
        """Run an MLP that keeps nothing; `x` ends, None is an input that stays."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        gate = self._linear_alone(shapes.gate_up[0])
        active = None if self.liger else t.new(s.wide(shapes.intermediate, s.inner), ACTIVATIONS)
        others = [self._linear_alone(linear) for linear in shapes.gate_up[1:]]
        t.free(x)
        product = t.new(s.wide(shapes.intermediate, s.inner), ACTIVATIONS)
        t.free(gate, active, *others)
        [down] = (self._linear_alone(linear) for linear in shapes.down)
        t.free(product)
        return down

    def _linear_alone(self, linear: Linear) -> int:
        saved = Saved()
        out = self._linear(linear, saved)
        [kept] = saved.products
        self.tape.free(*kept.own_input, kept.low, kept.base, kept.high)
        # autocast keeps its copies of trained weights until the whole forward is over
        if self.sizes.trains_all:
            self.cast += kept.copies
        else:
            self.tape.free(*kept.copies)
        return out

    def _saves_input(self, linear: Linear) -> bool:
        """Return whether the adapter saves its input, for the gradient of A."""
        return self.sizes.has_adapter(linear) and not self.sizes.config.method.freeze_a

    def _keeps_own_input(self, linear: Linear) -> bool:
        """Return whether what the adapter saves is a copy, and not the tensor that it is given."""
        return self._saves_input(linear) and self._casts_input(linear)

    def _casts_input(self, linear: Linear) -> bool:
        """Return whether the adapter's input is a copy: PEFT casts it to the adapter's fp32 under LoRA, autocast casts
        back; and a raised stream is cast for each product. Attention's output is in the products' format in any case.
        """
        s = self.sizes
        casts = self._casts and linear is not s.shapes.output
        return s.has_adapter(linear) and s.cell == 2 and (not s.quantised or casts)

    def _kept_input(self, linears: tuple[Linear, ...], x: int) -> int | None:
        """Return the input that layers share where an adapter saves it; end it otherwise."""
        keeps_shared = (self._saves_input(linear) and not self._keeps_own_input(linear) for linear in linears)
        if any(keeps_shared) and not self.sizes.config.method.dropout:
            return x
        if self.sizes.trains_all and not any(casts_input(self.sizes, linear) for linear in linears):
            return x
        self.tape.free(x)
        return None

    def _linear(self, linear: Linear, saved: Saved) -> int:
        t, s = self.tape, self.sizes
        kept = Product()
        saved.products.append(kept)
        if s.trains_all:
            return trained_output(t, s, linear, kept)
        weight = t.new(linear.weights * s.cell, WORKING) if s.quantised or s.stream != s.cell else None
        base = t.new(s.wide(linear.outputs, s.stream), ACTIVATIONS)
        if s.quantised or weight is None:
            t.free(weight)
        else:
            kept.copies.append(weight)
        if not s.has_adapter(linear):
            return base
        if s.quantised:
            clone = t.new(s.wide(linear.outputs, s.stream), ACTIVATIONS)
            t.free(base)
            base = clone
        wide = t.new(s.wide(linear.inputs, 4), WORKING) if not s.quantised and s.cell == 2 and not self._casts else None
        merged = merged_weight(t, s, linear) if s.config.method.use_dora else []
        given = None
        if s.config.method.dropout or self._casts_input(linear):
            given = t.new(s.wide(linear.inputs), ACTIVATIONS)
        if s.config.method.dropout:  # which numbers were dropped
            kept.own_input.append(t.new(s.wide(linear.inputs, 1), ACTIVATIONS))
        if s.cell == 2:
            kept.copies.append(t.new(2 * s.rank * (linear.inputs + linear.outputs), WORKING))
        kept.low = t.new(s.wide(s.rank), ACTIVATIONS)
        if self._saves_input(linear):
            kept.own_input += [] if given is None else [given]
        else:
            t.free(given)
        high = t.new(s.wide(linear.outputs), WORKING)
        if s.config.method.use_dora:
            kept.base, kept.high = base, high
            result = scaled_output(t, s, linear)
            t.free(*merged, wide)
            return result
        scaled = t.new(s.wide(linear.outputs), WORKING)
        t.free(high)
        result = t.new(s.wide(linear.outputs, s.stream), ACTIVATIONS)
        t.free(base, scaled, wide)
        return result

    def _attention(self, heads: list[int]) -> list[int]:
        """Begin what attention keeps: q and k after their rotation, v, its output, and a sum for each head."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        # with a mask, and without a fused kernel, k and v are repeated for each query head
        key = shapes.query_width if s.is_masked or s.config.attention is Attention.eager else shapes.key_width
        kept = [t.new(s.wide(width), ACTIVATIONS) for width in (shapes.query_width, key)]
        if (self._casts and not s.trains_all) or key != shapes.key_width:
            kept.append(t.new(s.wide(key), ACTIVATIONS))
            t.free(*heads)
        elif len(heads) == 1:
            kept += heads  # v is a part of it, and keeps all
        else:
            t.free(*heads[:2])
            kept.append(heads[2])
        if shapes.head_norm_weights:
            each = s.cell if self.liger else 4
            kept.append(t.new(s.wide(shapes.query_width + shapes.key_width, each), ACTIVATIONS))
            if s.trains_all and not self.liger:  # what their weights are multiplied with
                kept.append(t.new(s.wide(shapes.query_width + shapes.key_width), ACTIVATIONS))
        output, *others = attention_bytes(s)
        is_input = self._saves_input(shapes.output) and not self._keeps_own_input(shapes.output)
        if s.config.attention is not Attention.eager or is_input or not s.has_adapter(shapes.output):
            others = [output, *others]  # a fused kernel keeps its output, otherwise the next layer's adapter may
        return kept + [t.new(size, ACTIVATIONS) for size in others]

    def forward_again(self, layer_input: int) -> Saved:
        """Begin what a layer keeps that is calculated once more: by then the backward has begun."""
        between = None
        if self._experts is not None and not self.sizes.shapes.gate_up:
            between = self._experts.spread()
        saved = self.forward(layer_input, stops_early=True)
        saved.spread = between
        return saved

    def backward(self, saved: Saved, gradient: int) -> int:
        """End what the forward kept; return the gradient of the layer's input, which has taken `gradient`'s place."""
        t, s, shapes, n = self.tape, self.sizes, self.sizes.shapes, len(self.sizes.shapes.qkv)
        inner_gradient = self._norms.outer_backward(saved.outer, gradient)
        if self._tile is not None:
            gradient = self._tiles_backward(self._tile, saved, inner_gradient, gradient)
        elif saved.experts is None:
            gradient = self._mlp_backward(saved, inner_gradient, gradient)
        else:
            gradient = self._mixture_backward(saved, saved.experts, gradient)
        gradient = self._norms.backward([*saved.norms[-1:], *saved.scaled[-1:]], gradient)
        inner_gradient = self._norms.outer_backward(saved.outer, gradient)
        grad_attended = self._linear_backward(shapes.output, saved.products[n], inner_gradient)
        t.free(None if inner_gradient == gradient else inner_gradient)
        grads = [t.new(s.wide(linear.outputs), WORKING) for linear in shapes.qkv]
        t.free(*attention_backward(t, s), grad_attended, *saved.attention)
        gradient = self._inputs_backward(shapes.qkv, saved.products[:n], grads, saved.attention_input, gradient)
        return self._norms.backward([*saved.norms[:-1], *saved.scaled[:-1]], gradient)

    def _mlp_backward(self, saved: Saved, inner_gradient: int, gradient: int) -> int:
        """Return the gradient of the MLP's input; `inner_gradient`, of its output, and `gradient`, of the stream, end
        (they may be one)."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        inner, first = s.wide(shapes.intermediate, s.inner), len(shapes.qkv) + 1
        down = first + len(shapes.gate_up)
        grad_product = self._linear_backward(shapes.down[0], saved.products[down], inner_gradient)
        t.free(saved.product, None if inner_gradient == gradient else inner_gradient)
        if self.liger:
            grads = list(saved.mlp)  # its backward writes over what it had saved
            t.free(grad_product)
        elif len(shapes.gate_up) == 1:
            grads = [t.new(2 * inner, WORKING)]
            t.free(grad_product, *saved.mlp)
        else:
            grad_active, grad_up = t.new(inner, WORKING), t.new(inner, WORKING)
            t.free(grad_product, saved.mlp[0], saved.mlp[2])
            grad_gate = t.new(inner, WORKING)
            t.free(grad_active, saved.mlp[1])
            grads = [grad_gate, grad_up]
        return self._inputs_backward(shapes.gate_up, saved.products[first:down], grads, saved.mlp_input, gradient)

    def _tiles_backward(self, tile: "PlainLayer", saved: Saved, inner_gradient: int, gradient: int) -> int:
        """Calculate the MLP's tiles once more and go back through them; return and end what `_mlp_backward` does."""
        t, s = self.tape, self.sizes

        def run() -> int:
            kept, part = tile._nothing_yet(), t.new(0, WORKING)
            down = tile._mlp(t.new(0, WORKING), kept)
            found = tile._mlp_backward(kept, part, part)
            t.free(down)
            return found

        sums = t.new(mlp_sums(s), WORKING)
        found = over_tiles(t, s, tile.sizes, s.wide(s.shapes.hidden, s.stream), WORKING, run)
        t.free(sums, saved.mlp_input, None if inner_gradient == gradient else inner_gradient, gradient)
        return found

    def _mixture_backward(self, saved: Saved, kept: KeptExperts, gradient: int) -> int:
        """Return the gradient of the experts' input; `gradient`, of their output and of the stream, ends."""
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        experts = self._experts
        assert experts is not None
        if saved.shared is None:
            total = experts.backward(kept, experts.spread() if saved.spread is None else saved.spread)
            t.free(gradient, saved.mlp_input)
            return total
        of_shared, of_gate = t.new(s.wide(hidden, s.stream), WORKING), t.new(s.wide(1), WORKING)
        assert experts.experts.shared_gate is not None
        through_gate = self._linear_backward(experts.experts.shared_gate, saved.products[-1], of_gate)
        t.free(saved.shared, of_gate)
        total = experts.backward(kept, experts.spread())
        through_shared = self._mlp_backward(saved, of_shared, gradient)
        t.free(total, through_gate)
        return through_shared

    def _inputs_backward(
        self, linears: tuple[Linear, ...], kept: list[Product], grads: list[int], shared: int | None, gradient: int
    ) -> int:
        """Add up the gradients of the input that some layers share, behind a norm."""
        total = None
        for linear, each, grad in reversed(list(zip(linears, kept, grads, strict=True))):
            found = self._linear_backward(linear, each, grad)
            self.tape.free(grad)
            if total is None:
                total = found
            else:
                self.tape.free(found)
        self.tape.free(shared, gradient)
        assert total is not None
        return total

    def _linear_backward(self, linear: Linear, kept: Product, gradient: int) -> int:
        """Return the gradient of a linear layer's input. `gradient`, of its output, stays."""
        t, s = self.tape, self.sizes
        if s.trains_all:
            return trained_backward(t, s, linear, kept)
        low = of_base = None
        if s.has_adapter(linear):
            if kept.base is not None and kept.high is not None:
                of_base, scaled = output_backward(t, s, linear, kept.base, kept.high)
            else:
                scaled = t.new(s.wide(linear.outputs), WORKING)
            narrow = t.new(s.wide(s.rank), WORKING)
            t.free(scaled)
            low = t.new(s.wide(linear.inputs), WORKING)
            if self._casts_input(linear):  # back through both casts of the input
                wide = t.new(s.wide(linear.inputs, 4), WORKING)
                t.free(low)
                low = t.new(s.wide(linear.inputs, s.stream), WORKING)
                t.free(wide)
            adapter_gradients(t, s, linear)
            t.free(narrow, kept.low, *kept.own_input)
        weight = t.new(linear.weights * s.cell, WORKING) if s.quantised else None
        base = t.new(s.wide(linear.inputs, s.stream), WORKING)
        t.free(weight, low, of_base, *kept.copies)
        return base
