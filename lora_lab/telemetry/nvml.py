"""Read NVIDIA cards through NVML. The only importer of pynvml."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from lora_lab.telemetry.sampler import Sample, SensorFailed

_Value = TypeVar("_Value")

# one call reads all of these: name of ours, NVML's field, what turns its unit into ours
_FAST_FIELDS = {
    "energy_joules": (pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, 1e-3),
    "average_watts": (pynvml.NVML_FI_DEV_POWER_AVERAGE, 1e-3),
    "instant_watts": (pynvml.NVML_FI_DEV_POWER_INSTANT, 1e-3),
}
_THERMAL = ("thermal_by_software_seconds", "thermal_by_hardware_seconds")
_SLOW_FIELDS = {
    "power_cap_seconds": (pynvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP, 1e-9),
    _THERMAL[0]: (pynvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN, 1e-9),
    _THERMAL[1]: (pynvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN, 1e-9),
    "brake_seconds": (pynvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN, 1e-9),
}
_SLOW: dict[str, Callable[[Any], Any]] = {
    "used_bytes": lambda handle: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
    "temperature_celsius": lambda handle: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    "sm_mhz": lambda handle: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
    "memory_mhz": lambda handle: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
    "slowdowns": lambda handle: int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
}
_UNION = {
    pynvml.NVML_VALUE_TYPE_DOUBLE: "dVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
}
"""The member of NVML's union that holds a value of each type."""


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

    def sample(self, slow: bool = True) -> Sample:
        """Read the sensors once; without `slow` only energy and power.

        Raises: SensorFailed when the card does not answer at all.
        """
        before = time.monotonic()
        handle = self._handle()
        if handle is None:
            raise SensorFailed("NVML: the card is not found")
        told = _fields(handle, _FAST_FIELDS | (_SLOW_FIELDS if slow else {}))
        # older cards and drivers answer these calls, but not the fields
        if "energy_joules" not in told:
            told["energy_joules"] = _offered(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
        if "average_watts" not in told:
            told["average_watts"] = _offered(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
        if slow:
            told |= {name: _offered(lambda read=read: read(handle)) for name, read in _SLOW.items()}  # type: ignore[misc]
            thermal = [told.pop(part) for part in _THERMAL if part in told]
            told["thermal_seconds"] = sum(thermal) if thermal else None
            listed = _offered(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
            told["processes"] = None if listed is None else tuple((each.pid, each.usedGpuMemory) for each in listed)
        if not any(value is not None for value in told.values()):
            raise SensorFailed("NVML: no sensor of the card answers")
        return Sample(t=(before + time.monotonic()) / 2, **told)

    def limit_watts(self) -> float | None:
        """Return the most that the card may draw; None where the driver does not say."""
        return _offered(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle()) / 1e3)

    def _handle(self) -> Any:
        return _offered(lambda: pynvml.nvmlDeviceGetHandleByUUID(self.uuid))

    def users(self) -> dict[int, int | None]:
        """Return bytes of device memory by pid for each process that computes on the card; None where the driver
        does not say. Empty where processes are invisible (WSL2, some containers)."""
        handle = self._handle()
        listed = _offered(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
        return {process.pid: process.usedGpuMemory for process in listed}


def cards() -> list[Card]:
    """Return every card of this machine; empty without a driver.

    Raises: SensorFailed when there is a driver but its cards cannot be read (for example after an update without a
    reboot).
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
    """Return the cards that CUDA_VISIBLE_DEVICES leaves to this process, in its order."""
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


def _fields(handle: Any, asked: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """Return the fields that the card offers, in our units."""
    values = _offered(lambda: pynvml.nvmlDeviceGetFieldValues(handle, [field for field, _ in asked.values()])) or ()
    return {
        name: getattr(value.value, _UNION[value.valueType]) * unit
        for (name, (_, unit)), value in zip(asked.items(), values, strict=False)
        if value.nvmlReturn == pynvml.NVML_SUCCESS and value.valueType in _UNION
    }


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _offered(read: Callable[[], _Value]) -> _Value | None:
    """Return a value, or None for a sensor that the card does not have; NVML raises an error for those."""
    with contextlib.suppress(pynvml.NVMLError):
        return read()
    return None
