"""One reading of a card: in our units, and None for whatever the card or its driver does not offer."""

import dataclasses
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_lab.telemetry import nvml
from lora_lab.telemetry.nvml import Card, cards
from lora_lab.telemetry.sampler import Sample, SensorFailed

FAKES = Path(__file__).parents[1] / "fakes"
FAST = {"energy_joules", "instant_watts", "average_watts"}
SLOW = {
    "used_bytes",
    "processes",
    "temperature_celsius",
    "sm_mhz",
    "memory_mhz",
    "slowdowns",
    "power_cap_seconds",
    "thermal_seconds",
}
"""Of the fake card, which has no counter of power brakes."""
CALLS = {
    "nvmlDeviceGetMemoryInfo": {"used_bytes"},
    "nvmlDeviceGetTemperature": {"temperature_celsius"},
    "nvmlDeviceGetClockInfo": {"sm_mhz", "memory_mhz"},
    "nvmlDeviceGetCurrentClocksEventReasons": {"slowdowns"},
    "nvmlDeviceGetFieldValues": {"instant_watts", "power_cap_seconds", "thermal_seconds"},
}
"""What each call alone can tell; energy and average power are told by two."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(str(FAKES))
    for name in ("FIELDS", "STATE", "USERS", "CARDS", "DRIVER"):
        monkeypatch.delenv(f"FAKE_NVML_{name}", raising=False)
    module = importlib.import_module("pynvml")
    monkeypatch.setattr(nvml, "pynvml", module)
    return module


@pytest.fixture
def card(fake: Any) -> Card:
    return cards()[0]


def told(sample: Sample) -> set[str]:
    return {name for name, value in dataclasses.asdict(sample).items() if value is not None} - {"t", "card"}


def fails(fake: Any) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise fake.NVMLError("Not Supported")

    return fail


def test_every_sensor_is_read_in_our_units(fake: Any, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_USERS", f"4242:{2**30},17:")
    shown = {
        fake.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION: fake._long(12_345_678),
        fake.NVML_FI_DEV_POWER_AVERAGE: fake._short(61_500),
        fake.NVML_FI_DEV_POWER_INSTANT: fake._short(59_250),
        fake.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP: fake._long(7_500_000_000),
        fake.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN: fake._long(1_250_000_000),
        fake.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN: fake._long(250_000_000),
        fake.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN: fake._long(3_000_000_000),
    }
    monkeypatch.setattr(fake, "SHOWN", shown)
    before = time.monotonic()
    sample = card.sample()
    assert before <= sample.t <= time.monotonic()
    assert dataclasses.replace(sample, t=0.0) == Sample(
        t=0.0,
        energy_joules=pytest.approx(12_345.678),  # type: ignore[arg-type]
        average_watts=pytest.approx(61.5),  # type: ignore[arg-type]
        instant_watts=pytest.approx(59.25),  # type: ignore[arg-type]
        used_bytes=2**30,
        processes=((4242, 2**30), (17, None)),
        temperature_celsius=50.0,
        sm_mhz=1500.0,
        memory_mhz=1500.0,
        slowdowns=0,
        power_cap_seconds=pytest.approx(7.5),  # type: ignore[arg-type]
        thermal_seconds=pytest.approx(1.5),  # type: ignore[arg-type]
        brake_seconds=pytest.approx(3.0),  # type: ignore[arg-type]
    )


def test_a_fast_reading_is_of_energy_and_power_alone(card: Card) -> None:
    assert told(card.sample(slow=False)) == FAST
    assert told(card.sample(slow=True)) == FAST | SLOW


def test_a_driver_without_field_values_still_tells_the_counter_and_average_power(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML_FIELDS", "none")
    sample = card.sample()
    assert told(sample) == (FAST | SLOW) - CALLS["nvmlDeviceGetFieldValues"]
    assert sample.average_watts == 100.0
    assert sample.energy_joules == pytest.approx(100 * time.monotonic(), rel=0.01)


def test_a_card_that_does_not_know_one_field_is_asked_the_older_way(
    fake: Any, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = dict.fromkeys(
        (fake.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, fake.NVML_FI_DEV_POWER_AVERAGE), fake.NOT_SUPPORTED
    )
    monkeypatch.setattr(fake, "SHOWN", unknown)
    assert told(card.sample(slow=False)) == FAST


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_costs_what_it_alone_tells_and_no_more(
    fake: Any, card: Card, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(fake, call, fails(fake))
    assert told(card.sample()) == (FAST | SLOW) - CALLS[call]


def test_a_card_that_is_gone_has_failed(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_CARDS", "0")
    with pytest.raises(SensorFailed, match="not found"):
        card.sample()


@pytest.mark.parametrize("slow", [False, True])
def test_a_card_none_of_whose_sensors_answers_has_failed(
    fake: Any, card: Card, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """A GPU that fell off the bus: its handle may still be had."""
    asked = [*CALLS, "nvmlDeviceGetComputeRunningProcesses"]
    for call in [*asked, "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"]:
        monkeypatch.setattr(fake, call, fails(fake))
    with pytest.raises(SensorFailed):
        card.sample(slow)


def test_processes_that_can_not_be_listed_are_not_nobody(
    fake: Any, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert card.sample().processes == ()
    monkeypatch.setattr(fake, "nvmlDeviceGetComputeRunningProcesses", fails(fake))
    assert card.sample().processes is None


def test_what_one_call_has_told_is_not_asked_for_again(fake: Any, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes its time, twenty times a second."""
    asked: list[str] = []
    fields = fake.nvmlDeviceGetFieldValues(None, [fake.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION] * 3)
    monkeypatch.setattr(fake, "nvmlDeviceGetFieldValues", lambda *_: fields)
    for call in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"):
        monkeypatch.setattr(fake, call, lambda _, call=call: asked.append(call) or 1)
    card.sample(slow=False)
    assert asked == []


def test_a_cards_limit_is_in_watts_and_none_where_the_driver_has_none(
    card: Card, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert card.limit_watts() == 300.0
    monkeypatch.setattr(fake, "nvmlDeviceGetEnforcedPowerLimit", fails(fake))
    assert card.limit_watts() is None
