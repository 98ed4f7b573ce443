"""Add the gradient of tied input embeddings to the head's, in the head's memory.

Where one matrix is embeddings and head, autograd has two gradients of its size at the end of the backward, and adds
them. That of the embeddings has a row for each token of the batch and is zero otherwise. So the head's is kept aside
when it is known, and the embeddings' backward, the last of all, adds its rows and hands on the sum.
"""

from typing import Any

import torch
from torch import Tensor


class Aside:
    """Keeps the head's gradient from its backward until that of the embeddings."""

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def put(self, gradient: Tensor) -> None:
        """Keep a gradient of shape (vocabulary, hidden size), with those that were put before."""
        self._gradient = gradient if self._gradient is None else self._gradient.add_(gradient)

    def take(self) -> Tensor | None:
        """Return it and keep it no longer; None where the loss was not calculated through the head."""
        found, self._gradient = self._gradient, None
        return found


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, aside: Aside, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.aside, ctx.padding, ctx.words = aside, padding, weight.shape[0]
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        whole, found = ctx.aside.take(), grads[0]
        if whole is None:
            padding = -1 if ctx.padding is None else ctx.padding
            whole = torch.ops.aten.embedding_dense_backward(found, ids, ctx.words, padding, False)
            return None, whole, None, None
        ids, found = ids.reshape(-1), found.reshape(-1, found.shape[-1])
        if ctx.padding is not None:
            found = found.masked_fill((ids == ctx.padding).unsqueeze(1), 0)
        add_rows(whole, ids, found)
        return None, whole, None, None


def add_rows(whole: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add rows to those of `whole` that `ids` name, in place. What goes to one row is added up in fp32 first. Nothing
    waits for the device.

    Args:
        whole: (words, size).
        ids: (rows,), which may repeat.
        rows: (rows, size).
    """
    ordered, order = ids.sort()
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    place = is_first.cumsum(0) - 1
    sums = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    sums.index_add_(0, place, rows[order].float())
    # there are as many sums as ids; where fewer are used, the rest repeats the first one, for the same row
    numbers = torch.arange(len(ids), device=ids.device)
    numbers = torch.where(numbers <= place[-1], numbers, 0)
    named = torch.empty_like(ordered).index_copy_(0, place, ordered)[numbers]
    whole.index_copy_(0, named, sums[numbers].add_(whole[named]).to(whole.dtype))


def tie(embeddings: torch.nn.Embedding) -> Aside:
    """Let embeddings add their gradient to the one that is put aside."""
    aside = Aside()

    def forward(input: Tensor) -> Tensor:
        found: Tensor = _Embedded.apply(input, embeddings.weight, aside, embeddings.padding_idx)
        return found

    embeddings.forward = forward  # type: ignore[method-assign]
    return aside
