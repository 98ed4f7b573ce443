"""Give an optimizer large weights in pieces, so that a step takes in addition what a piece needs, and not what the
largest weight does: of a small model that is the embeddings, a sixth of it.

It serves optimizers whose arithmetic is by element, or by blocks that a piece has whole.
"""

from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 24
"""Elements of a piece; torchao's and bitsandbytes' blocks are smaller powers of two."""


class InPieces:
    """Mixed into an optimizer's class, before it. Its state is that of the pieces, in the weights' order."""

    def __init__(self: Any, params: Any, **arguments: Any) -> None:
        """Take parameter groups, each a dict with `params`."""
        self.pieces: dict[Any, list[Any]] = {}
        """The pieces of each weight: views of its storage, or the weight itself where it is small."""
        groups = []
        for group in params:
            for weight in group["params"]:
                self.pieces[weight] = _pieces_of(weight)
            groups.append({**group, "params": [each for weight in group["params"] for each in self.pieces[weight]]})
        self._split = [(weight, own) for weight, own in self.pieces.items() if len(own) > 1]
        super().__init__(groups, **arguments)  # type: ignore[call-arg]

    def step(self: Any, closure: Any = None) -> None:
        """Update every weight that has a gradient, piece by piece."""
        for weight, pieces in self._split:
            if weight.grad is not None:
                for piece, gradient in zip(pieces, weight.grad.reshape(-1).split(PIECE), strict=True):
                    piece.grad = gradient
        super().step()  # type: ignore[misc]
        for _, pieces in self._split:
            for piece in pieces:
                piece.grad = None


def _pieces_of(weight: Any) -> list[Any]:
    if weight.numel() <= PIECE:
        return [weight]
    flat: Tensor = weight.detach().view(-1)
    return [torch.nn.Parameter(part) for part in flat.split(PIECE)]
