"""Hold the adapters in the compute dtype, laid out as products over several layers take them."""

import torch
from torch import Tensor


class ComputeCopies(dict[Tensor, Tensor]):
    """Maps each adapter matrix to its copy. Autocast would convert each matrix in each step with a kernel of its own.
    The training step takes the gradients of the copies, and calls `refresh` before the forward."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[tuple[Tensor, Tensor]] = []
        """A block of many layers' diagonals, and the copy that it is filled from: one for each kind of layer."""

    def add(self, pairs: list[list[tuple[Tensor, Tensor]]], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Copy the adapters of groups that are alike.

        Args:
            pairs: for each group, for each layer in it, A (rank, inputs) and B (outputs, rank).

        Returns: for each group all A stacked, and all B block-diagonal.
        """
        like = pairs[0]
        ranks, outputs, inputs = [a.shape[0] for a, _ in like], [b.shape[0] for _, b in like], like[0][0].shape[1]
        device = like[0][0].device
        below = torch.empty(len(pairs), sum(ranks), inputs, dtype=dtype, device=device)
        diagonal = torch.zeros(len(pairs), sum(outputs), sum(ranks), dtype=dtype, device=device)
        row = column = 0
        for member, (rank, wide) in enumerate(zip(ranks, outputs, strict=True)):
            block = diagonal[:, row : row + wide, column : column + rank]
            # for one layer the diagonal is the block
            own = diagonal if len(like) == 1 else torch.empty_like(block, memory_format=torch.contiguous_format)
            if len(like) > 1:
                self._blocks.append((block, own))
            for group, layers in enumerate(pairs):
                a, b = layers[member]
                # .data: compiled code distinguishes views from other tensors, and views by their offset
                self[a] = below[group, column : column + rank].data.requires_grad_()
                self[b] = own[group].data.requires_grad_()
            row, column = row + wide, column + rank
        self.refresh()
        return [(below[group].data, diagonal[group].data) for group in range(len(pairs))]

    def refresh(self) -> None:
        """Copy the present adapters."""
        if not self:
            return
        with torch.no_grad():
            torch._foreach_copy_(list(self.values()), list(self))
            for block, own in self._blocks:
                block.copy_(own)
