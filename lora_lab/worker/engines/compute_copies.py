"""Adapters in the format of the products, and laid out as products over several layers take them."""

import torch
from torch import Tensor


class ComputeCopies(dict[Tensor, Tensor]):
    """For each adapter's matrix its copy: autocast would convert each in each step by itself. Whoever trains takes
    gradients over the copies, and brings them up to date."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[tuple[Tensor, Tensor]] = []
        """A block of many layers' diagonals, and what it is to hold: as few copies as there are kinds of layers."""

    def add(self, pairs: list[list[tuple[Tensor, Tensor]]], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Copy the adapters of groups that are alike.

        Args:
            pairs: for each group, for each layer in it, A (rank, inputs) and B (outputs, rank).

        Returns: for each group all A one below the other, and all B as blocks on a diagonal.
        """
        like = pairs[0]
        ranks, outputs, inputs = [a.shape[0] for a, _ in like], [b.shape[0] for _, b in like], like[0][0].shape[1]
        device = like[0][0].device
        below = torch.empty(len(pairs), sum(ranks), inputs, dtype=dtype, device=device)
        diagonal = torch.zeros(len(pairs), sum(outputs), sum(ranks), dtype=dtype, device=device)
        row = column = 0
        for member, (rank, wide) in enumerate(zip(ranks, outputs, strict=True)):
            block = diagonal[:, row : row + wide, column : column + rank]
            # of one layer the diagonal is the block
            own = diagonal if len(like) == 1 else torch.empty_like(block, memory_format=torch.contiguous_format)
            if len(like) > 1:
                self._blocks.append((block, own))
            for group, layers in enumerate(pairs):
                a, b = layers[member]
                # .data: compiled code tells a view from a tensor of its own, and one place in it from another
                self[a] = below[group, column : column + rank].data.requires_grad_()
                self[b] = own[group].data.requires_grad_()
            row, column = row + wide, column + rank
        self.refresh()
        return [(below[group].data, diagonal[group].data) for group in range(len(pairs))]

    def refresh(self) -> None:
        """Bring all up to date with the adapters."""
        if not self:
            return
        with torch.no_grad():
            torch._foreach_copy_(list(self.values()), list(self))
            for block, own in self._blocks:
                block.copy_(own)
