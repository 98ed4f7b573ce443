"""Energy against cards whose power is known exactly."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.telemetry.energy import Energy, window_energy
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.window import Window

TICK = 0.1
"""Seconds between two moves of an NVIDIA card's counter."""

Joules = Callable[[float], float]
"""Energy drawn from 0 to t."""


def constant(watts: float) -> Joules:
    return lambda t: watts * t


def swinging(mean: float, swing: float, period: float) -> Joules:
    return lambda t: mean * t + swing * period / (2 * math.pi) * (1 - math.cos(2 * math.pi * t / period))


def card(drawn: Joules, until: float, interval: float, phase: float = 0.0, jitter: float = 0.0) -> list[Sample]:
    """
    What a sampler sees of a card that draws `drawn`: a counter that shows the energy up to its last tick,
    read every `interval` seconds, each reading up to `jitter` late."""
    samples = []
    for number in range(int(until / interval) + 1):
        t = number * interval + jitter * interval * (number * 0.618 % 1)
        ticked = math.floor((t - phase) / TICK) * TICK + phase
        samples.append(
            Sample(
                t=t,
                energy_joules=round(1e6 + drawn(ticked), 3),
                power_watts=(drawn(t + 1e-3) - drawn(t - 1e-3)) / 2e-3,
                used_bytes=None,
                temperature_celsius=None,
            )
        )
    return samples


def without_counter(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, energy_joules=None) for sample in samples]


def window(start: float, end: float) -> Window:
    return Window(start, end, ())


def joules(energy: Energy) -> float:
    assert energy.joules is not None, energy.reason
    return energy.joules


@settings(max_examples=150)
@given(
    start=st.floats(0.3, 2),
    seconds=st.floats(5, 10),
    interval=st.floats(0.02, 0.13),
    phase=st.floats(0, TICK),
    jitter=st.floats(0, 0.9),
    mean=st.floats(60, 700),
    swing=st.floats(0, 0.9),
    period=st.floats(3, 30),
)
def test_the_counter_gives_the_windows_energy_within_one_tick(
    start: float,
    seconds: float,
    interval: float,
    phase: float,
    jitter: float,
    mean: float,
    swing: float,
    period: float,
) -> None:
    drawn = swinging(mean, swing * mean, period)
    energy = window_energy(window(start, start + seconds), card(drawn, start + seconds + 0.5, interval, phase, jitter))
    assert energy.source == "counter"
    one_tick = mean * (1 + swing) * TICK
    assert abs(joules(energy) - (drawn(start + seconds) - drawn(start))) <= 1.05 * one_tick


@settings(max_examples=60)
@given(lost=st.sets(st.integers(2, 79)), start=st.floats(0.5, 1.5))
def test_readings_that_the_counter_missed_cost_no_accuracy_at_constant_power(lost: set[int], start: float) -> None:
    samples = [
        replace(sample, energy_joules=None) if number in lost else sample
        for number, sample in enumerate(card(constant(300), 8.2, 0.1, phase=0.03))
    ]
    energy = window_energy(window(start, 6.5), samples)
    if energy.joules is None:
        assert len(lost) > 20, energy.reason
    else:
        assert abs(energy.joules - 300 * (6.5 - start)) <= 300 * TICK + 0.01


@pytest.mark.parametrize("source", ["counter", "power"])
def test_constant_power_is_power_times_time(source: str) -> None:
    samples = card(constant(250), 62, 0.1, phase=0.04)
    energy = window_energy(window(1.0, 61.0), samples if source == "counter" else without_counter(samples))
    assert energy.source == source
    assert joules(energy) == pytest.approx(250 * 60, rel=1e-3 if source == "counter" else 1e-9)


def test_idle_draw_counts() -> None:
    """A card that does nothing at 126 W still costs 126 J a second."""
    assert joules(window_energy(window(1, 11), card(constant(126), 12, 0.1))) == pytest.approx(1260, rel=0.01)


@given(
    start=st.floats(0.1, 3),
    seconds=st.floats(0.01, 6),
    watts=st.floats(50, 400),
    slope=st.floats(-5, 60),
    interval=st.floats(0.05, 0.9),
)
def test_without_a_counter_a_ramp_of_power_is_integrated_exactly(
    start: float, seconds: float, watts: float, slope: float, interval: float
) -> None:
    def drawn(t: float) -> float:
        return watts * t + slope * t * t / 2

    end = start + seconds
    energy = window_energy(window(start, end), without_counter(card(drawn, end + 1, interval, jitter=0.5)))
    assert energy.source == "power"
    assert joules(energy) == pytest.approx(drawn(end) - drawn(start), rel=1e-6)


def refused(energy: Energy) -> str:
    assert energy.joules is None
    assert energy.source == "none"
    assert energy.reason
    return energy.reason


@pytest.mark.parametrize("at", [3, 25, 60])
def test_a_counter_that_runs_backwards_is_not_believed(at: int) -> None:
    """A driver reload in the middle of a trial begins at 0 again; power is no silent way out."""
    samples = card(constant(300), 7, 0.1)
    broken = [s if i < at else replace(s, energy_joules=(s.energy_joules or 0) - 1e6) for i, s in enumerate(samples)]
    assert "backwards" in refused(window_energy(window(1, 6), broken))
    broken[4] = replace(broken[4], energy_joules=None)
    assert "backwards" in refused(window_energy(window(1, 6), broken))


@pytest.mark.parametrize("seconds", [0.05, 1.0, 1.7])
def test_a_window_of_few_ticks_has_no_energy(seconds: float) -> None:
    assert "ticks" in refused(window_energy(window(1, 1 + seconds), card(constant(300), 4, 0.02)))


def test_a_counter_that_stands_still_is_no_measurement_of_zero() -> None:
    samples = [replace(sample, energy_joules=5.0) for sample in card(constant(300), 12, 0.1)]
    assert "0 ticks" in refused(window_energy(window(1, 11), samples))


@pytest.mark.parametrize("counter", [True, False])
@pytest.mark.parametrize(("first", "last"), [(2.0, 9.0), (0.0, 5.0), (2.0, 5.0)])
def test_a_window_that_was_not_covered_has_no_energy(counter: bool, first: float, last: float) -> None:
    samples = [sample for sample in card(constant(300), 9, 0.1) if first <= sample.t <= last]
    refused(window_energy(window(1.0, 8.0), samples if counter else without_counter(samples)))


def test_a_card_that_was_never_read_has_no_energy() -> None:
    assert "sensor" in refused(window_energy(window(0, 1), []))


def test_a_card_that_offers_neither_sensor_has_no_energy() -> None:
    silent = [replace(sample, energy_joules=None, power_watts=None) for sample in card(constant(300), 9, 0.1)]
    refused(window_energy(window(1, 8), silent))
