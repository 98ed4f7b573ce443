"""The allocations of a decoder layer run operation by operation: transformers, PEFT and bitsandbytes under autocast.

Read from their code: what each operation saves for the backward, which copies autocast and PEFT make, and when each
tensor is dropped. Engine liger differs in the norms, in the MLP and in the rotation, by its kernels' code.
"""

from dataclasses import dataclass, field

from lora_lab.fit.shapes import Linear
from lora_lab.fit.step import ACTIVATIONS, WORKING, Sizes, adapter_gradients, attention_bytes
from lora_lab.fit.tape import Tape


@dataclass(slots=True)
class _Product:
    """What a linear layer with its adapter keeps for the backward."""

    own_input: list[int] = field(default_factory=list)
    low: int | None = None
    copies: list[int] = field(default_factory=list)


class PlainLayer:
    """A decoder layer; forward and backward write on a tape."""

    def __init__(self, tape: Tape, sizes: Sizes, liger: bool) -> None:
        self.tape, self.sizes, self.liger = tape, sizes, liger
        self._casts = sizes.stream != sizes.cell
        """Whether the residual stream is wider than the products."""
        self._keeps_stream = liger or sizes.stream == 4
        """Whether norms keep their input itself, and not a copy in fp32."""

    def forward(self, layer_input: int, has_gradient: bool = True) -> "Saved":
        """Begin what a forward keeps, and its output. `layer_input` is kept or ended.

        Args:
            layer_input: the tensor that the layer gets.
            has_gradient: False for the first layer where nothing before it needs a gradient.
        """
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        saved = Saved()
        x = self._norm(saved.norms, layer_input, has_gradient)
        heads = [self._linear(linear, saved) for linear in shapes.qkv]
        saved.attention_input = self._kept_input(shapes.qkv, x)
        saved.attention = self._attention(heads)
        attended = self._linear(shapes.output, saved)
        residual = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        t.free(attended)
        self._outer_norm(saved)
        if not (self._keeps_stream and has_gradient):
            t.free(layer_input)
        x = self._norm(saved.norms, residual, has_gradient=True)
        gate_up = [self._linear(linear, saved) for linear in shapes.gate_up]
        saved.mlp_input = self._kept_input(shapes.gate_up, x)
        inner = s.wide(shapes.intermediate, s.stream)
        if not self.liger:
            saved.mlp.append(t.new(inner, ACTIVATIONS))  # the activated gate
        saved.mlp += gate_up
        product = t.new(inner, ACTIVATIONS)
        down = self._linear(shapes.down, saved)
        saved.product = self._kept_input((shapes.down,), product)
        saved.output = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        t.free(down)
        self._outer_norm(saved)
        if not self._keeps_stream:
            t.free(residual)
        return saved

    def forward_alone(self) -> int:
        """Run a forward that keeps nothing; return its output."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        x = self._norm_alone()
        heads = [self._linear_alone(linear) for linear in shapes.qkv]
        t.free(x)
        attention = self._attention(heads)
        attended = self._linear_alone(shapes.output)
        t.free(*attention)
        residual = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        t.free(attended)
        x = self._norm_alone()
        gate = self._linear_alone(shapes.gate_up[0])
        active = None if self.liger else t.new(s.wide(shapes.intermediate, s.stream), ACTIVATIONS)
        others = [self._linear_alone(linear) for linear in shapes.gate_up[1:]]
        t.free(x)
        product = t.new(s.wide(shapes.intermediate, s.stream), ACTIVATIONS)
        t.free(gate, active, *others)
        down = self._linear_alone(shapes.down)
        t.free(product)
        output = t.new(s.wide(shapes.hidden, s.stream), ACTIVATIONS)
        t.free(down, residual)
        return output

    def _norm_alone(self) -> int:
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        working = (
            [] if self.liger else [t.new(s.wide(hidden, 4), WORKING) for _ in range(1 if self._keeps_stream else 2)]
        )
        out = t.new(s.wide(hidden, s.stream), ACTIVATIONS)
        t.free(*working)
        return out

    def _linear_alone(self, linear: Linear) -> int:
        saved = Saved()
        out = self._linear(linear, saved)
        [kept] = saved.products
        self.tape.free(*kept.own_input, kept.low, *kept.copies)
        return out

    def _outer_norm(self, saved: "Saved") -> None:
        """Begin what a norm behind attention or the MLP keeps, in families that have one."""
        if self.sizes.shapes.layer_norms == 4:
            saved.outer.append(self.tape.new(self.sizes.wide(self.sizes.shapes.hidden, 4), ACTIVATIONS))

    def _keeps_own_input(self, linear: Linear) -> bool:
        """Return whether the adapter saves a copy of its input, and not the tensor that it is given: PEFT casts it to
        the adapter's fp32 under LoRA, autocast casts back; and a raised stream is cast for each product. Attention's
        output is in the products' format in any case."""
        s = self.sizes
        casts = self._casts and linear is not s.shapes.output
        return s.has_adapter(linear) and s.cell == 2 and (not s.quantised or casts)

    def _kept_input(self, linears: tuple[Linear, ...], x: int) -> int | None:
        """Return the input that layers share where an adapter saves it; end it otherwise."""
        keeps_shared = (self.sizes.has_adapter(linear) and not self._keeps_own_input(linear) for linear in linears)
        if any(keeps_shared) and not self.sizes.config.method.dropout:
            return x
        self.tape.free(x)
        return None

    def _norm(self, norms: list[int], stream: int, has_gradient: bool) -> int:
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        if self._keeps_stream:
            if has_gradient:
                norms.append(stream)
            scaled = None if self.liger else t.new(s.wide(hidden, 4), WORKING)
            out = t.new(s.wide(hidden, s.stream), ACTIVATIONS)
            t.free(scaled)
            return out
        wide = t.new(s.wide(hidden, 4), ACTIVATIONS)
        scaled = t.new(s.wide(hidden, 4), WORKING)
        out = t.new(s.wide(hidden, s.stream), ACTIVATIONS)
        t.free(scaled)
        if has_gradient:
            norms.append(wide)
        else:
            t.free(wide)
        return out

    def _linear(self, linear: Linear, saved: "Saved") -> int:
        t, s = self.tape, self.sizes
        kept = _Product()
        saved.products.append(kept)
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
        if s.config.method.dropout or self._keeps_own_input(linear):
            kept.own_input.append(t.new(s.wide(linear.inputs), ACTIVATIONS))
        if s.config.method.dropout:  # which numbers were dropped
            kept.own_input.append(t.new(s.wide(linear.inputs, 1), ACTIVATIONS))
        if s.cell == 2:
            kept.copies.append(t.new(2 * s.rank * (linear.inputs + linear.outputs), WORKING))
        kept.low = t.new(s.wide(s.rank), ACTIVATIONS)
        high = t.new(s.wide(linear.outputs), WORKING)
        scaled = t.new(s.wide(linear.outputs), WORKING)
        t.free(high)
        result = t.new(s.wide(linear.outputs, s.stream), ACTIVATIONS)
        if s.config.method.use_dora:  # its norm takes the whole weight in fp32; both parts of the result are kept
            t.free(*[t.new(4 * linear.weights, WORKING) for _ in range(3)], wide)
            kept.own_input += [base, scaled]
        else:
            t.free(base, scaled, wide)
        return result

    def _attention(self, heads: list[int]) -> list[int]:
        """Begin what attention keeps: q and k after their rotation, v, its output, and a sum for each head."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        # with a mask k and v are repeated for each query head: no kernel that takes one shares them
        key = shapes.query_width if s.is_masked else shapes.key_width
        kept = [t.new(s.wide(width), ACTIVATIONS) for width in (shapes.query_width, key)]
        if self._casts or key != shapes.key_width:
            kept.append(t.new(s.wide(key), ACTIVATIONS))
            t.free(*heads)
        elif len(heads) == 1:
            kept += heads  # v is a part of it, and keeps all
        else:
            t.free(*heads[:2])
            kept.append(heads[2])
        if shapes.head_norms:
            each = s.cell if self.liger else 4
            kept.append(t.new(s.wide(shapes.query_width + shapes.key_width, each), ACTIVATIONS))
        return kept + [t.new(size, ACTIVATIONS) for size in attention_bytes(s)]

    def backward(self, saved: "Saved", gradient: int) -> int:
        """End what the forward kept; return the gradient of the layer's input, which has taken `gradient`'s place."""
        t, s, shapes = self.tape, self.sizes, self.sizes.shapes
        inner = s.wide(shapes.intermediate, s.stream)
        *first, down = saved.products
        inner_gradient = self._outer_backward(saved, gradient)
        grad_product = self._linear_backward(shapes.down, down, inner_gradient)
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
        n = len(shapes.qkv)
        gradient = self._inputs_backward(shapes.gate_up, first[n + 1 :], grads, saved.mlp_input, gradient)
        gradient = self._norm_backward(saved.norms[-1:], gradient)
        inner_gradient = self._outer_backward(saved, gradient)
        grad_attended = self._linear_backward(shapes.output, first[n], inner_gradient)
        t.free(None if inner_gradient == gradient else inner_gradient)
        grads = [t.new(s.wide(linear.outputs), WORKING) for linear in shapes.qkv]
        t.free(grad_attended, *saved.attention)
        gradient = self._inputs_backward(shapes.qkv, first[:n], grads, saved.attention_input, gradient)
        return self._norm_backward(saved.norms[:-1], gradient)

    def _outer_backward(self, saved: "Saved", gradient: int) -> int:
        """Return the gradient before a norm behind attention or the MLP; `gradient` itself in families without one."""
        if not saved.outer:
            return gradient
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        working = [t.new(s.wide(hidden, 4), WORKING) for _ in range(4)]
        out = t.new(s.wide(hidden, s.stream), WORKING)
        t.free(*working, saved.outer.pop())
        return out

    def _inputs_backward(
        self, linears: tuple[Linear, ...], kept: list[_Product], grads: list[int], shared: int | None, gradient: int
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

    def _linear_backward(self, linear: Linear, kept: _Product, gradient: int) -> int:
        """Return the gradient of a linear layer's input. `gradient`, of its output, stays."""
        t, s = self.tape, self.sizes
        low = None
        if s.has_adapter(linear):
            scaled = t.new(s.wide(linear.outputs), WORKING)
            narrow = t.new(s.wide(s.rank), WORKING)
            t.free(scaled)
            low = t.new(s.wide(linear.inputs), WORKING)
            if self._keeps_own_input(linear):  # back through both casts of the input
                wide = t.new(s.wide(linear.inputs, 4), WORKING)
                t.free(low)
                low = t.new(s.wide(linear.inputs, s.stream), WORKING)
                t.free(wide)
            adapter_gradients(t, s, linear)
            t.free(narrow, kept.low, *kept.own_input)
        weight = t.new(linear.weights * s.cell, WORKING) if s.quantised else None
        base = t.new(s.wide(linear.inputs, s.stream), WORKING)
        t.free(weight, low, *kept.copies)
        return base

    def _norm_backward(self, norm: list[int], gradient: int) -> int:
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        if self.liger:
            t.free(*norm)
            return gradient
        working = [t.new(s.wide(hidden, 4), WORKING) for _ in range(4)]
        out = t.new(s.wide(hidden, s.stream), WORKING)
        t.free(*working, *norm, gradient)
        return out


@dataclass(slots=True)
class Saved:
    """What a layer's forward keeps for its backward, by tensor number."""

    norms: list[int] = field(default_factory=list)
    outer: list[int] = field(default_factory=list)
    """Of norms behind attention and MLP."""
    attention_input: int | None = None
    mlp_input: int | None = None
    attention: list[int] = field(default_factory=list)
    mlp: list[int] = field(default_factory=list)
    """The activated gate where it is kept, then gate and up."""
    product: int | None = None
    """The input of the last linear layer."""
    products: list[_Product] = field(default_factory=list)
    output: int | None = None
