"""Calculate an adapter's two gradients from one reading of the output gradient instead of two.

The gradient of a layer's output, (rows, outputs), is multiplied with B for the gradient of x A', and its transpose with
x A' for the gradient of B. Both products are only as wide as the adapter's rank, and take as long as reading the output
gradient: 294 MB at 16384 rows of 8960 in 16 bits, 98 microseconds each at an H100's 3 TB/s. Here each tile of it is
read once and multiplied twice while it is on the chip. The partial sums are kept in 32 bits, 23 MB to write and to read
in that case, and added up in a fixed order: the results are the same bits each time.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

LEAST_READ_ONCE = 2**26
"""Elements of the output gradient from which it pays. Of a smaller one much is still in an H100's cache of 50 MB at the
second reading."""

MOST_RANK = 64

HAS_TRITON = find_spec("triton") is not None

_TILE_ROWS = 64
"""Rows of a tile: the fewest that a warp group of an H100 multiplies from shared memory."""

_LEAD = 4
"""The time of a program's start and end, in tiles: it does not read then."""

_WARPS = 8
_STAGES = 3
"""Tiles in shared memory: one is multiplied while the next are copied."""


def tile_columns(padded: int) -> int:
    """Return the columns of a tile. More columns leave fewer partial sums; three tiles must fit into the 227 KB of an
    H100's multiprocessor.

    Args:
        padded: the rank as a power of two from 16.
    """
    return 512 if padded == 16 else 256


def reads_once(rows: int, columns: int, rank: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return True where `lora_gradients` pays for an output gradient (rows, columns). Cards other than Hopper's have
    too little shared memory for its tiles, or were never tried. And Triton copies 16 bytes at a time only if it knows
    that the columns are a multiple of 16."""
    if rows * columns < LEAST_READ_ONCE or columns % 16 or rank > MOST_RANK or dtype.itemsize != 2:
        return False
    return device.type == "cuda" and HAS_TRITON and torch.cuda.get_device_capability(device)[0] == 9


def lora_gradients(grad_output: Tensor, b: Tensor, lora_hidden: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Calculate scaling * grad_output @ b, and grad_output' @ lora_hidden.

    The first call for a rank and a format compiles, and so must not happen in a CUDA graph's capture; later ones may.

    Args:
        grad_output: (rows, columns), at least one of each.
        b: (columns, rank).
        lora_hidden: (rows, rank); all contiguous, on one device and in one format.

    Returns: (rows, rank); (columns, rank).
    """
    from lora_lab.worker.engines import lora_grad_triton  # Triton comes with torch for CUDA alone

    (rows, columns), rank = grad_output.shape, b.shape[1]
    padded = max(16, 1 << (rank - 1).bit_length())
    wide = tile_columns(padded)
    blocks = -(-columns // wide)
    span = _TILE_ROWS * _tiles_of_part(-(-rows // _TILE_ROWS), blocks, _processors(grad_output.device))
    parts = -(-rows // span)
    partial_hidden = grad_output.new_empty(blocks, rows, rank, dtype=torch.float32)
    partial_b = grad_output.new_empty(parts, columns, rank, dtype=torch.float32)
    grad_hidden, grad_b = grad_output.new_empty(rows, rank), grad_output.new_empty(columns, rank)
    shape = {"rank": rank, "padded": padded, "tall": _TILE_ROWS, "wide": wide}
    lora_grad_triton.products[blocks, parts](
        *(grad_output, b, lora_hidden, partial_hidden, partial_b, rows, columns, span),
        **shape,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    size = 512
    lora_grad_triton.sums[-(-max(grad_hidden.numel(), grad_b.numel()) // size), 2](
        *(grad_hidden, partial_hidden, grad_hidden.numel(), blocks, grad_b, partial_b, grad_b.numel(), parts, scaling),
        size=size,
    )
    return grad_hidden, grad_b


def _processors(device: torch.device) -> int:
    """Count the multiprocessors, each of which holds one program; an H100's for a CPU, which only runs tests."""
    return 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _tiles_of_part(tiles: int, blocks: int, slots: int) -> int:
    """Choose the tiles of one program, for `tiles` in each of `blocks` with `slots` programs at a time. Of two that
    take equally long choose the larger: it leaves fewer partial sums."""

    def time(each: int) -> int:
        return -(-blocks * -(-tiles // each) // slots) * (each + _LEAD)

    return min(range(tiles, 0, -1), key=time)
