"""NVIDIA cards as NVML sees them. The only importer of pynvml."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from lora_lab.telemetry.sampler import Sample, SensorFailed

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Card:
    """One NVIDIA card."""

    index: int
    """nvidia-smi's number."""
    uuid: str
    name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    driver: str

    def sample(self) -> Sample:
        """Read the sensors once.

        Raises: SensorFailed when the card does not answer at all.
        """
        before = time.monotonic()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
        except pynvml.NVMLError as error:
            raise SensorFailed(f"NVML: {error}") from error
        energy = _offered(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
        power = _offered(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
        used = _offered(lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))
        temperature = _offered(lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)))
        return Sample(
            t=(before + time.monotonic()) / 2,
            energy_joules=energy,
            power_watts=power,
            used_bytes=used,
            temperature_celsius=temperature,
        )

    def users(self) -> dict[int, int | None]:
        """Bytes of device memory by the pid of each process that calculates on the card; None where the driver
        does not say. Empty where processes can't be seen (WSL2, some containers)."""
        handle = _offered(lambda: pynvml.nvmlDeviceGetHandleByUUID(self.uuid))
        listed = _offered(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
        return {process.pid: process.usedGpuMemory for process in listed}


def cards() -> list[Card]:
    """Every card of this machine; empty without a driver.

    Raises: SensorFailed when there is a driver but its cards can't be read (after an update without a reboot, say).
    """
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    except pynvml.NVMLError as error:
        raise SensorFailed(f"NVML: {error}") from error
    try:
        return [_card(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise SensorFailed(f"NVML: {error}") from error


def visible_cards() -> list[Card]:
    """The cards that CUDA_VISIBLE_DEVICES leaves to this process, in its order."""
    there = cards()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return there
    chosen = []
    for item in filter(None, (part.strip() for part in listed.split(","))):
        chosen += [card for card in there if card.uuid.startswith(item) or str(card.index) == item]
    return chosen


def _card(index: int) -> Card:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return Card(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        driver=_text(pynvml.nvmlSystemGetDriverVersion()),
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _offered(read: Callable[[], _Value]) -> _Value | None:
    """A card without a sensor says so with an error each time."""
    with contextlib.suppress(pynvml.NVMLError):
        return read()
    return None
