"""The allocations of a decoder layer's norms run operation by operation."""

from lora_lab.fit.step import ACTIVATIONS, WORKING, Sizes
from lora_lab.fit.tape import Tape


class PlainNorms:
    """The norms of a layer; forward and backward write on a tape."""

    def __init__(self, tape: Tape, sizes: Sizes, liger: bool) -> None:
        self.tape, self.sizes, self.liger = tape, sizes, liger
        self.keeps_stream = liger or sizes.stream == 4
        """Whether norms keep their input itself, and not a copy in fp32."""

    def forward(self, norms: list[int], scaled_ones: list[int], stream: int, has_gradient: bool) -> int:
        """Begin a norm's output, and list what it keeps.

        Args:
            norms: gets its input, or a copy of that.
            scaled_ones: gets what its weights are multiplied with, where they are trained.
            stream: its input.
            has_gradient: False where the input needs none.
        """
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        if self.keeps_stream:
            if has_gradient:
                norms.append(stream)
            scaled = None if self.liger else t.new(s.wide(hidden, 4), WORKING)
            out = t.new(s.wide(hidden, s.stream), ACTIVATIONS)
            if scaled is not None and s.trains_all:
                scaled_ones.append(scaled)
            else:
                t.free(scaled)
            return out
        wide = t.new(s.wide(hidden, 4), ACTIVATIONS)
        scaled = t.new(s.wide(hidden, 4), WORKING)
        if s.trains_all and not self.liger:
            scaled_ones.append(t.new(s.wide(hidden), WORKING))
        out = t.new(s.wide(hidden, s.stream), ACTIVATIONS)
        t.free(scaled)
        if has_gradient:
            norms.append(wide)
        else:
            t.free(wide)
        return out

    def forward_alone(self) -> int:
        """Begin the output of a norm that keeps nothing."""
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        working = (
            [] if self.liger else [t.new(s.wide(hidden, 4), WORKING) for _ in range(1 if self.keeps_stream else 2)]
        )
        out = t.new(s.wide(hidden, s.stream), ACTIVATIONS)
        t.free(*working)
        return out

    def outer_forward(self, outer: list[int]) -> None:
        """Begin what a norm behind attention or the MLP keeps, in families that have one."""
        if self.sizes.shapes.layer_norms == 4:
            outer.append(self.tape.new(self.sizes.wide(self.sizes.shapes.hidden, 4), ACTIVATIONS))

    def backward(self, norm: list[int], gradient: int) -> int:
        """End what a norm kept; return the gradient of its input, which takes `gradient`'s place."""
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        if self.liger:
            t.free(*norm)
            return gradient
        working = [t.new(s.wide(hidden, 4), WORKING) for _ in range(4)]
        out = t.new(s.wide(hidden, s.stream), WORKING)
        t.free(*working, *norm, gradient)
        return out

    def outer_backward(self, outer: list[int], gradient: int) -> int:
        """Return the gradient before a norm behind attention or the MLP; `gradient` itself in families without one."""
        if not outer:
            return gradient
        t, s, hidden = self.tape, self.sizes, self.sizes.shapes.hidden
        working = [t.new(s.wide(hidden, 4), WORKING) for _ in range(4)]
        out = t.new(s.wide(hidden, s.stream), WORKING)
        t.free(*working, outer.pop())
        return out
