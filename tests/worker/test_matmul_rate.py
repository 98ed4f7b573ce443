"""The device's rate: the right number for a device whose rate is known, and quick on a real one."""

import random
import time
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_lab.worker import matmul_rate
from lora_lab.worker.matmul_rate import LARGEST, SMALLEST, measure_matmul_rate

CPU = torch.device("cpu")
Operands = tuple[Tensor, Tensor, Tensor]


class Pretended:
    """A device whose products take as long as its rate says, its first ones and some others longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rate: float, room: int = LARGEST) -> None:
        self._rate, self._room = rate, room
        self._chance, self._calls = random.Random(0), count()
        self.sizes: list[int] = []
        monkeypatch.setattr(matmul_rate, "_timed", self.timed)
        monkeypatch.setattr(matmul_rate, "_operands", self.operands)
        monkeypatch.setattr(matmul_rate, "TOTAL_SECONDS", 0.01)

    def operands(self, size: int, device: torch.device, dtype: torch.dtype) -> Operands:
        if size > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.")
        made = torch.empty(size, size, device="meta")
        return made, made, made

    def timed(self, operands: Operands, count: int) -> float:
        size = len(operands[0])
        first = not self.sizes or self.sizes[-1] != size
        self.sizes.append(size)
        disturbed = 50.0 if first else 1.0 if next(self._calls) % 3 == 0 else self._chance.uniform(1, 5)
        return 2.0 * size**3 / self._rate * disturbed


@pytest.mark.parametrize(
    ("rate", "size"),
    [(1.2e9, SMALLEST), (1.5e11, 1024), (1.5e13, 4096), (4e13, LARGEST), (8e14, LARGEST), (1e17, LARGEST)],
)
def test_the_rate_is_the_devices_own_whatever_disturbs(rate: float, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended(monkeypatch, rate)
    told = measure_matmul_rate(CPU, torch.bfloat16)
    assert told.flops_per_second == pytest.approx(rate)
    assert told.size == size
    assert told.dtype == "bfloat16"


@pytest.mark.parametrize("room", [SMALLEST, 1024, 4096])
def test_where_memory_ends_the_size_before_is_measured(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pretended(monkeypatch, 8e14, room)
    told = measure_matmul_rate(CPU, torch.float16)
    assert told.size == room == max(device.sizes)
    assert told.flops_per_second == pytest.approx(8e14)


@pytest.mark.parametrize("size", [SMALLEST, 1024])
def test_an_error_that_is_not_for_memory_is_told(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pretended(monkeypatch, 8e14)

    def broken(asked: int, *rest: Any) -> Operands:
        if asked >= size:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return device.operands(asked, *rest)

    monkeypatch.setattr(matmul_rate, "_operands", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        measure_matmul_rate(CPU, torch.float32)


def test_this_cpus_rate_is_what_a_plain_clock_tells() -> None:
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    told = measure_matmul_rate(CPU, torch.float32)
    # a mistake in units or in the count would be a factor of 8 and more; a busy machine is one of a few
    assert 0.05 < told.flops_per_second * min(seconds) / (2 * 1024**3) < 8
    assert told.t <= time.monotonic()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dtype_that_the_cpu_is_slow_in_takes_no_longer(dtype: torch.dtype) -> None:
    """fp16 products run at 2.5 GFLOP/s on a CPU without them, where a square of 8,192 would take minutes."""
    start = time.monotonic()
    told = measure_matmul_rate(CPU, dtype)
    assert time.monotonic() - start < 20
    assert told.flops_per_second > 0


def test_a_trials_random_numbers_are_the_same_with_it_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured by the first trial on a device and by none after it."""
    monkeypatch.setattr(matmul_rate, "TOTAL_SECONDS", 0.01)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    measure_matmul_rate(CPU, torch.float32)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.gpu
def test_on_a_card_nothing_is_left_allocated_and_random_numbers_stay() -> None:
    torch.cuda.manual_seed(7)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.get_rng_state(), torch.cuda.memory_reserved()
    told = measure_matmul_rate(torch.device("cuda", 0), torch.bfloat16)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.cuda.memory_reserved() == reserved
    assert told.flops_per_second > 1e12
