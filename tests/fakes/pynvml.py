"""
A Fake of the part of pynvml that lora_lab.telemetry.nvml calls. Set before the first call:

FAKE_NVML_CARDS: how many cards there are (1); 0 leaves none.
FAKE_NVML_NAME: the name of every card; without it each has its own.
FAKE_NVML_CAPABILITY: their compute capability (8.6).
FAKE_NVML_DRIVER: `missing` makes nvmlInit fail as it does on a machine without a driver, `mismatch` as it does
    after an update without a reboot.
FAKE_NVML_USERS: pid and used bytes of each process that calculates, as `4242:1073741824,17:`; without bytes the
    driver does not say. Empty: nobody.
FAKE_NVML_FIELDS: `none` for a driver that knows no field values.
FAKE_NVML_STATE: a file with `{"used": bytes, "temperature": degrees}`, either left out where the fake's own will do;
    read at every call, so that a test can change it while a process runs.
"""

# ruff: noqa: N802  # pynvml's own names

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

NVML_SUCCESS = 0
NVML_ERROR_NOT_SUPPORTED = 3
NVML_TEMPERATURE_GPU = 0
NVML_CLOCK_SM = 1
NVML_CLOCK_MEM = 2
NVML_VALUE_TYPE_DOUBLE = 0
NVML_VALUE_TYPE_UNSIGNED_INT = 1
NVML_VALUE_TYPE_UNSIGNED_LONG = 2
NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 3
NVML_VALUE_TYPE_SIGNED_LONG_LONG = 4
NVML_VALUE_TYPE_SIGNED_INT = 5
NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP = 74
NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION = 83
NVML_FI_DEV_POWER_AVERAGE = 185
NVML_FI_DEV_POWER_INSTANT = 186
NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN = 269
NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN = 270
NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN = 271

_POWER_MILLIWATTS = 100_000


class NVMLError(Exception):
    """What every call raises when it can't answer."""


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801
    """There is no driver."""


class NVMLError_DriverNotLoaded(NVMLError):  # noqa: N801
    """The driver's library is there, the driver is not."""


@dataclass(frozen=True)
class _Handle:
    index: int


@dataclass(frozen=True)
class _Memory:
    total: int
    used: int


@dataclass(frozen=True)
class _Process:
    pid: int
    usedGpuMemory: int | None  # noqa: N815


def uuid_of(index: int) -> str:
    """The UUID that the fake card `index` has."""
    return f"GPU-{index:08x}-0000-0000-0000-000000000000"


def nvmlInit() -> None:
    if os.environ.get("FAKE_NVML_DRIVER") == "missing":
        raise NVMLError_DriverNotLoaded("Driver Not Loaded")
    if os.environ.get("FAKE_NVML_DRIVER") == "mismatch":
        raise NVMLError("Driver/library version mismatch")


def nvmlDeviceGetCount() -> int:
    return int(os.environ.get("FAKE_NVML_CARDS", "1"))


def nvmlSystemGetDriverVersion() -> str:
    return "fake-driver"


def nvmlDeviceGetHandleByIndex(index: int) -> _Handle:
    if not 0 <= index < nvmlDeviceGetCount():
        raise NVMLError("Invalid Argument")
    return _Handle(index)


def nvmlDeviceGetHandleByUUID(uuid: str) -> _Handle:
    for index in range(nvmlDeviceGetCount()):
        if uuid_of(index) == uuid:
            return _Handle(index)
    raise NVMLError("Not Found")


def nvmlDeviceGetUUID(handle: _Handle) -> str:
    return uuid_of(handle.index)


def nvmlDeviceGetName(handle: _Handle) -> str:
    return os.environ.get("FAKE_NVML_NAME") or f"Fake Card {handle.index}"


def nvmlDeviceGetCudaComputeCapability(handle: _Handle) -> tuple[int, int]:
    major, _, minor = os.environ.get("FAKE_NVML_CAPABILITY", "8.6").partition(".")
    return int(major), int(minor)


def nvmlDeviceGetMemoryInfo(handle: _Handle) -> _Memory:
    return _Memory(total=8 * 2**30, used=_state().get("used", 2**30))


def nvmlDeviceGetComputeRunningProcesses(handle: _Handle) -> list[_Process]:
    users = filter(None, os.environ.get("FAKE_NVML_USERS", "").split(","))
    told = [user.partition(":") for user in users]
    return [_Process(int(pid), int(used) if used else None) for pid, _, used in told]


def nvmlDeviceGetTotalEnergyConsumption(handle: _Handle) -> int:
    return int(time.monotonic() * _POWER_MILLIWATTS)


def nvmlDeviceGetPowerUsage(handle: _Handle) -> int:
    return _POWER_MILLIWATTS


def nvmlDeviceGetEnforcedPowerLimit(handle: _Handle) -> int:
    return 3 * _POWER_MILLIWATTS


@dataclass(frozen=True)
class _Value:
    """A union: the members that a field was not written to hold nothing that is meant."""

    ullVal: int = 0xDEAD_BEEF  # noqa: N815
    uiVal: int = 0xDEAD_BEEF  # noqa: N815


@dataclass(frozen=True)
class _Field:
    nvmlReturn: int  # noqa: N815
    value: _Value
    valueType: int  # noqa: N815


def nvmlDeviceGetFieldValues(handle: _Handle, fields: list[int]) -> list[_Field]:
    if os.environ.get("FAKE_NVML_FIELDS") == "none":
        raise NVMLError("Function Not Found")
    milliwatts = nvmlDeviceGetPowerUsage(handle)
    told = {
        NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION: _long(nvmlDeviceGetTotalEnergyConsumption(handle)),
        NVML_FI_DEV_POWER_AVERAGE: _short(milliwatts),
        NVML_FI_DEV_POWER_INSTANT: _short(milliwatts),
        NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP: _long(0),
        NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN: _long(0),
        NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN: _long(0),
    } | SHOWN
    return [told.get(field) or NOT_SUPPORTED for field in fields]


def _long(value: int) -> _Field:
    return _Field(NVML_SUCCESS, _Value(ullVal=value), NVML_VALUE_TYPE_UNSIGNED_LONG_LONG)


def _short(value: int) -> _Field:
    return _Field(NVML_SUCCESS, _Value(uiVal=value), NVML_VALUE_TYPE_UNSIGNED_INT)


NOT_SUPPORTED = _Field(NVML_ERROR_NOT_SUPPORTED, _Value(), NVML_VALUE_TYPE_DOUBLE)
SHOWN: dict[int, _Field] = {}
"""Fields that a test in the same process shows instead."""


def nvmlDeviceGetClockInfo(handle: _Handle, kind: int) -> int:
    return 1500


def nvmlDeviceGetCurrentClocksEventReasons(handle: _Handle) -> int:
    return 0


def nvmlDeviceGetTemperature(handle: _Handle, sensor: int) -> int:
    return _state().get("temperature", 50)


def _state() -> dict[str, int]:
    path = os.environ.get("FAKE_NVML_STATE")
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
