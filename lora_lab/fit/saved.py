"""What a layer that is run operation by operation keeps for its backward, by tensor number."""

from dataclasses import dataclass, field

from lora_lab.fit.plain_experts import KeptExperts


@dataclass(slots=True)
class Product:
    """What a linear layer with its adapter keeps for the backward."""

    own_input: list[int] = field(default_factory=list)
    low: int | None = None
    base: int | None = None
    """The frozen layer's output, under DoRA."""
    high: int | None = None
    """The adapter's output, under DoRA."""
    copies: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Saved:
    """What a layer's forward keeps for its backward, by tensor number."""

    norms: list[int] = field(default_factory=list)
    scaled: list[int] = field(default_factory=list)
    """What trained norms multiply with their weights."""
    outer: list[int] = field(default_factory=list)
    """Of norms behind attention and MLP."""
    attention_input: int | None = None
    mlp_input: int | None = None
    attention: list[int] = field(default_factory=list)
    mlp: list[int] = field(default_factory=list)
    """The activated gate where it is kept, then gate and up."""
    product: int | None = None
    """The input of the last linear layer."""
    experts: KeptExperts | None = None
    shared: int | None = None
    """The output of the MLP next to experts."""
    spread: int | None = None
    """The gradient of each expert's output, where it was there before the forward."""
    products: list[Product] = field(default_factory=list)
    output: int | None = None

    def of_mlp(self) -> list[int | None]:
        """List what an MLP keeps, its input included."""
        kept: list[int | None] = [self.mlp_input, *self.mlp, self.product]
        for each in self.products:
            kept += [*each.own_input, each.low, each.base, each.high, *each.copies]
        return kept
