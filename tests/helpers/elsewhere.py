"""A stand-in for host memory that the card reads."""

from torch import Tensor


class Elsewhere:
    """Stands in for the copy to host memory, and remembers what came."""

    def __init__(self) -> None:
        self.copies: list[Tensor] = []

    def __call__(self, weight: Tensor) -> Tensor:
        self.copies.append(weight.detach().clone())
        return self.copies[-1]
