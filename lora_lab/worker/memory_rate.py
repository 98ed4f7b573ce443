"""Measure how fast the device copies within its memory, the reference for everything that is not a product."""

import math
import time

import torch

from lora_lab.config import TrialConfig
from lora_lab.matmul_cache import RateKey, load_rate, store_rate
from lora_lab.memory_cache import load_bytes, store_bytes
from lora_lab.work import DeviceRates
from lora_lab.worker.matmul_rate import measure_matmul_rate, rate_key
from lora_lab.worker.models import working_dtype

_GPU_BYTES = 2**30
_CPU_BYTES = 2**27
"""Of what is copied: several times the caches of a device."""
TOTAL_SECONDS = 0.5


def measure_memory_rate(device: torch.device) -> float:
    """Return the bytes per second that a copy reads and writes, of the fastest of all copies in half a second."""
    size = _GPU_BYTES if device.type == "cuda" else _CPU_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best, end = math.inf, time.monotonic() + TOTAL_SECONDS
    while time.monotonic() < end:
        best = min(best, _seconds(source, target))
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * size / best


def _seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    if source.device.type != "cuda":
        start = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def known_rates(config: TrialConfig) -> DeviceRates | None:
    """Return the rates of this process's device where both were measured before."""
    matmul_key, memory_key, _ = _keys(config)
    matmul, memory = load_rate(matmul_key), load_bytes(memory_key)
    return None if matmul is None or memory is None else DeviceRates(matmul, memory)


def measured_rates(config: TrialConfig) -> DeviceRates:
    """Measure the rates that are not known, and remember them."""
    matmul_key, memory_key, device = _keys(config)
    matmul = load_rate(matmul_key)
    if matmul is None:
        matmul = measure_matmul_rate(device, working_dtype(config.precision.dtype, device))
        store_rate(matmul_key, matmul)
    memory = load_bytes(memory_key)
    if memory is None:
        memory = measure_memory_rate(device)
        store_bytes(memory_key, memory)
    return DeviceRates(matmul, memory)


def _keys(config: TrialConfig) -> tuple[RateKey, RateKey, torch.device]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = working_dtype(config.precision.dtype, device)
    return rate_key(device, dtype), rate_key(device, torch.uint8), device
