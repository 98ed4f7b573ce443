"""Provide the kernels that update weights in one pass. Import only where they run: Triton comes with torch for CUDA
alone. What they calculate is said, and calculated on a CPU, in `adamw_8bit.update` and `descent.update`."""

import triton
import triton.language as tl


@triton.jit
def adamw_8bit(
    weight: tl.tensor,
    gradient: tl.tensor,
    codes_1: tl.tensor,
    scales_1: tl.tensor,
    codes_2: tl.tensor,
    scales_2: tl.tensor,
    key: tl.tensor,
    numbers: tl.tensor,
    lowest: tl.tensor,
    midpoints: tl.tensor,
    scalars: tl.tensor,
    blocks: tl.tensor,
    rounds: tl.constexpr,
    together: tl.constexpr,
    size: tl.constexpr,
) -> None:
    """Take one step of AdamW for `together` blocks of `size` elements.

    Args:
        scalars: (7,) fp32, see `adamw_8bit.update`.
        rounds: whether weights are rounded at random.
    """
    rows = tl.program_id(0) * together + tl.arange(0, together)
    here = rows < blocks
    at = rows.to(tl.int64)[:, None] * size + tl.arange(0, size)[None, :]
    inside = here[:, None]
    decay, rate, root = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    eps, new_1, new_2 = tl.load(scalars + 3), tl.load(scalars + 4), tl.load(scalars + 5)
    slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    first = _decoded(codes_1 + at, scales_1 + rows, numbers, inside, here)
    second = _decoded(codes_2 + at, scales_2 + rows, numbers + 256, inside, here)
    first += new_1 * (slope - first)
    second += new_2 * (slope * slope - second)
    exact = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    exact = decay * exact - rate * first / (tl.sqrt_rn(second) * root + eps)
    _encode(codes_1 + at, scales_1 + rows, first, lowest, midpoints, inside, here)
    _encode(codes_2 + at, scales_2 + rows, second, lowest + 65536, midpoints + 256, inside, here)
    if rounds:
        exact = _rounded(exact, at, tl.load(key), tl.load(scalars + 6))
    tl.store(weight + at, exact.to(weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key"])
def descend(
    weight: tl.tensor,
    gradient: tl.tensor,
    scalars: tl.tensor,
    key: tl.tensor,
    elements: tl.tensor,
    size: tl.constexpr,
) -> None:
    """Take one step of gradient descent for `size` elements in bf16, rounded at random.

    Args:
        scalars: (3,) fp32, see `descent.update`.
    """
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < elements
    slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    exact = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    exact = tl.load(scalars) * exact - tl.load(scalars + 1) * slope
    exact = _rounded(exact, at, key, tl.load(scalars + 2))
    tl.store(weight + at, exact.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _decoded(codes: tl.tensor, scales: tl.tensor, numbers: tl.tensor, inside: tl.tensor, here: tl.tensor) -> tl.tensor:
    found = tl.load(codes, mask=inside, other=0).to(tl.int32)
    return tl.load(numbers + found) * tl.load(scales, mask=here, other=0.0)[:, None]


@triton.jit
def _encode(
    codes: tl.tensor,
    scales: tl.tensor,
    exact: tl.tensor,
    lowest: tl.tensor,
    midpoints: tl.tensor,
    inside: tl.tensor,
    here: tl.tensor,
) -> None:
    """Do what `dynamic_codes.encode_into` does. A maximum leaves out what is no number, so that is looked for."""
    largest = tl.max(tl.abs(exact), axis=1)
    largest = tl.where(tl.max((exact != exact).to(tl.int32), axis=1) > 0, float("nan"), largest)
    parts = tl.div_rn(exact, tl.broadcast_to(tl.where(largest > 0, largest, 1.0)[:, None], exact.shape))
    upper = (parts.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)
    found = tl.load(lowest + upper).to(tl.int32)
    found += (parts > tl.load(midpoints + found)).to(tl.int32)
    tl.store(codes, found.to(tl.uint8), mask=inside)
    tl.store(scales, largest, mask=here)


@triton.jit
def _rounded(exact: tl.tensor, at: tl.tensor, key: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Do what `rounding.rounded_by_place` does."""
    seed = _mixed(key.to(tl.uint32, bitcast=True) + _mixed(step.to(tl.uint32)))
    noise = _mixed(at.to(tl.uint32) + seed) & 0xFFFF
    bits = exact.to(tl.uint32, bitcast=True)
    bits = tl.where((bits & 0x7F800000) != 0x7F800000, bits + noise, bits)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _mixed(bits: tl.tensor) -> tl.tensor:
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)
