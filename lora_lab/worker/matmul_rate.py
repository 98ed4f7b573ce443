"""Measure the device's best rate of matrix products, the reference for a trial's own speed."""

import math
import time
from itertools import repeat

import torch
from torch import Tensor

from lora_lab.events import MatmulRate
from lora_lab.machine import cpu_name
from lora_lab.matmul_cache import RateKey
from lora_lab.outcome import says_out_of_memory

SMALLEST, LARGEST = 256, 8192
"""Sides of the squares that are tried. The smallest takes a fiftieth of a second where nothing larger is bearable:
fp16 on a CPU that does not calculate in it."""
LONG_ENOUGH_SECONDS = 0.004
"""A product that takes this long keeps every unit of the device busy; the next size takes eight times as long."""
BATCH_SECONDS = 0.03
TOTAL_SECONDS = 0.9


def rate_key(device: torch.device, dtype: torch.dtype) -> RateKey:
    """Return the key under which this device's rate is cached."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return RateKey(device=uuid, cuda=str(torch.version.cuda), torch=torch.__version__, dtype=name)
    cpu = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return RateKey(device=cpu, cuda="", torch=torch.__version__, dtype=name)


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> MatmulRate:
    """Measure the device's best rate for products of two square matrices, in about a second.

    The rate is 2 x size^3 operations over the time of a product in the fastest of all batches. A batch is as many
    products as take 30 ms, so that the timer's resolution does not matter. Every other disturbance (clocks not up yet,
    another process, the first product's set-up) only slows, so the fastest batch is the device's own rate.

    torch's settings stay as they are (TF32, threads), and so does its random state. Nothing is left allocated.
    """
    try:
        size, rate = _measure(device, dtype)
    finally:
        if device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
    name = str(dtype).removeprefix("torch.")
    return MatmulRate(t=time.monotonic(), dtype=name, size=size, flops_per_second=rate)


def _measure(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """Return the side of the squares, and operations a second."""
    operands, seconds = _grown(device, dtype)
    size = len(operands[0])
    count = max(1, round(BATCH_SECONDS / seconds))
    end = time.monotonic() + TOTAL_SECONDS
    best = math.inf
    while time.monotonic() < end:
        best = min(best, _timed(operands, count))
    return size, 2 * size**3 / best


def _grown(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Grow the matrices as far as it pays; return them, and the seconds of one product."""
    size = SMALLEST
    operands = _operands(size, device, dtype)
    while True:
        _timed(operands, 1)  # the first of a size chooses its kernel
        seconds = min(_timed(operands, 1) for _ in range(3))
        if seconds >= LONG_ENOUGH_SECONDS or size == LARGEST:
            return operands, seconds
        try:
            operands = _operands(2 * size, device, dtype)
        except RuntimeError as error:
            if not says_out_of_memory(str(error)):
                raise
            return operands, seconds
        size *= 2


def _operands(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Make two random squares and room for their product. Zeros would draw less power, and so run faster."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    return left, right, torch.empty_like(left)


def _timed(operands: tuple[Tensor, Tensor, Tensor], count: int) -> float:
    """Return the seconds of one product, averaged over `count`; on a GPU by its own clock."""
    left, right, product = operands
    if left.device.type != "cuda":
        start = time.perf_counter()
        for _ in repeat(None, count):
            torch.mm(left, right, out=product)
        return (time.perf_counter() - start) / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in repeat(None, count):
        torch.mm(left, right, out=product)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count
