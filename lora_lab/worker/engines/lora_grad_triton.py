"""Provide the kernels of `lora_gradients`. Import only where they run: Triton comes with torch for CUDA alone."""

import triton
import triton.language as tl


@triton.jit
def products(
    grad_output: tl.tensor,
    b: tl.tensor,
    lora_hidden: tl.tensor,
    partial_hidden: tl.tensor,
    partial_b: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    span: tl.tensor,
    rank: tl.constexpr,
    padded: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """Calculate what a block of `wide` columns and a part of `span` rows adds to both products, unrounded.

    The program goes down the rows by tiles of `tall`. Each is copied to shared memory while those before are
    multiplied, and both products take it from there, one of them transposed.

    Args:
        partial_hidden: (blocks of columns, rows, rank).
        partial_b: (parts of rows, columns, rank).
        padded: the rank as Triton wants a product's side, a power of two from 16.
    """
    block = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    start = part * span
    down = tl.arange(0, tall)[:, None]
    across = tl.arange(0, wide)
    ranks = tl.arange(0, padded)[None, :]
    in_columns = block * wide + across < columns
    in_b = in_columns[:, None] & (ranks < rank)
    b_at = (block * wide + across)[:, None] * rank + ranks
    b_block = tl.load(b + b_at, mask=in_b, other=0.0)
    grad_b = tl.full([wide, padded], 0.0, tl.float32)
    # what moves is one pointer a matrix, in 64 bits; places in a tile stay the same, in 32
    grad_output += start * columns + block * wide
    lora_hidden += start * rank
    partial_hidden += (block * rows + start) * rank
    tile_at = down * columns + across[None, :]
    thin_at = down * rank + ranks
    left = tl.minimum(span, rows - start).to(tl.int32)
    for done in range(0, left, tall):
        in_rows = down < left - done
        in_thin = in_rows & (ranks < rank)
        tile = tl.load(grad_output + tile_at, mask=in_rows & in_columns[None, :], other=0.0)
        hidden_tile = tl.load(lora_hidden + thin_at, mask=in_thin, other=0.0)
        # in this order: the other way round ptxas lets every instruction of an H100's products wait for the last
        grad_b = tl.dot(tl.trans(tile), hidden_tile, grad_b, input_precision="ieee")
        grad_hidden = tl.dot(tile, b_block, input_precision="ieee")
        tl.store(partial_hidden + thin_at, grad_hidden, mask=in_thin)
        grad_output += tall * columns
        lora_hidden += tall * rank
        partial_hidden += tall * rank
    tl.store(partial_b + part * columns * rank + b_at, grad_b, mask=in_b)


@triton.jit
def sums(
    grad_hidden: tl.tensor,
    partial_hidden: tl.tensor,
    hidden_size: tl.tensor,
    blocks: tl.tensor,
    grad_b: tl.tensor,
    partial_b: tl.tensor,
    b_size: tl.tensor,
    parts: tl.tensor,
    scaling: tl.tensor,
    size: tl.constexpr,
) -> None:
    """Add up the partial sums of `products` in the order of blocks and parts, and round."""
    if tl.program_id(1) == 0:
        _sum(grad_hidden, partial_hidden, hidden_size, blocks, scaling, size)
    else:
        _sum(grad_b, partial_b, b_size, parts, 1.0, size)


@triton.jit
def _sum(
    whole: tl.tensor, addends: tl.tensor, length: tl.tensor, count: tl.tensor, factor: tl.tensor, size: tl.constexpr
) -> None:
    at = tl.program_id(0) * size + tl.arange(0, size)
    total = tl.full([size], 0.0, tl.float32)
    for _ in tl.range(0, count, loop_unroll_factor=8):  # that many loads wait for memory together
        total += tl.load(addends + at, mask=at < length, other=0.0)
        addends += length
    tl.store(whole + at, (total * factor).to(whole.dtype.element_ty), mask=at < length)
