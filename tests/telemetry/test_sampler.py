"""The sampler outlives its sensor, and the trial outlives both."""

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.telemetry.sampler import Sample, Sampler, SensorFailed

RATE = 2000.0
PATIENCE = 10.0


def reading() -> Sample:
    return Sample(t=time.monotonic(), energy_joules=None, power_watts=1.0, used_bytes=None, temperature_celsius=None)


def wait_until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(1e-3)


def sampling() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sampler"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert sampling() == []


def test_a_dead_sensor_ends_the_sampling_with_its_reason() -> None:
    asked = count()

    def read() -> Sample:
        next(asked)
        raise SensorFailed("GPU is lost")

    with Sampler(read, rate_hz=RATE) as sampler:
        wait_until(lambda: not sampling())
    assert sampler.fault == "GPU is lost"
    assert sampler.samples == []
    assert next(asked) < 100, "a dead sensor is not asked for ever"


def test_a_sensor_that_dies_in_a_trial_keeps_what_it_gave() -> None:
    asked = count()

    def read() -> Sample:
        if next(asked) >= 5:
            raise SensorFailed("fell off the bus")
        return reading()

    with Sampler(read, rate_hz=RATE) as sampler:
        wait_until(lambda: not sampling())
    assert len(sampler.samples) == 5
    assert sampler.fault == "fell off the bus"


def test_a_trial_shorter_than_the_samplers_patience_still_learns_of_a_dead_sensor() -> None:
    asked = threading.Event()

    def read() -> Sample:
        asked.set()
        raise SensorFailed("no answer")

    with Sampler(read, rate_hz=1.0) as sampler:
        assert asked.wait(PATIENCE)
    assert sampler.fault == "no answer"


@settings(max_examples=10)
@given(fails=st.lists(st.booleans(), min_size=1, max_size=15).filter(lambda fails: not all(fails)))
def test_a_sensor_that_fails_now_and_then_is_read_on(fails: list[bool]) -> None:
    """However often it fails in all: only failures in a row, without one answer, end the sampling."""
    asked = count()

    def read() -> Sample:
        if fails[next(asked) % len(fails)]:
            raise SensorFailed("busy")
        return reading()

    with Sampler(read, rate_hz=RATE) as sampler:
        wait_until(lambda: len(sampler.samples) >= 60)
        assert sampling()


def test_a_sensor_that_has_recovered_has_no_fault() -> None:
    """`fault` is what the figures that need samples give as their reason: there is none while samples come."""
    asked = count()

    def read() -> Sample:
        if next(asked) == 3:
            raise SensorFailed("busy")
        return reading()

    with Sampler(read, rate_hz=RATE) as sampler:
        wait_until(lambda: len(sampler.samples) >= 10)
    assert sampler.fault is None


def test_the_trials_own_error_goes_through() -> None:
    with pytest.raises(KeyError, match="mine"), Sampler(reading, rate_hz=RATE):
        raise KeyError("mine")


def test_without_a_sensor_nothing_is_started() -> None:
    with Sampler(None) as sampler:
        assert sampling() == []
    assert (sampler.samples, sampler.fault) == ([], None)


def test_readings_come_at_the_asked_rate_and_in_order() -> None:
    with Sampler(reading, rate_hz=100.0) as sampler:
        time.sleep(0.5)
    times = [sample.t for sample in sampler.samples]
    assert 10 <= len(times) <= 52
    assert all(before < after for before, after in pairwise(times))


def test_a_slow_reading_is_not_made_up_for_by_a_burst() -> None:
    """A burst would take the processor from the trial, and a hung driver makes for a long one."""
    asked = count()

    def read() -> Sample:
        if next(asked) == 2:
            time.sleep(0.3)
        return reading()

    with Sampler(read, rate_hz=50.0) as sampler:
        wait_until(lambda: len(sampler.samples) >= 8)
    times = [sample.t for sample in sampler.samples]
    assert all(after - before > 0.01 for before, after in pairwise(times[3:8]))


def test_every_reading_is_told_at_once_and_in_order() -> None:
    kept: list[Sample] = []
    with Sampler(reading, kept.append, rate_hz=RATE) as sampler:
        wait_until(lambda: len(kept) >= 20)
        assert sampling(), "while it is sampling, not at the end"
    assert kept == sampler.samples


def test_what_a_failing_sensor_gave_before_is_kept_once() -> None:
    asked = count()
    kept: list[Sample] = []

    def read() -> Sample:
        if next(asked) % 3 == 1:
            raise SensorFailed("busy")
        return reading()

    with Sampler(read, kept.append, rate_hz=RATE) as sampler:
        wait_until(lambda: len(kept) >= 20)
    assert kept == sampler.samples


def test_a_reading_that_hangs_past_the_end_is_not_kept() -> None:
    """A driver can hang for longer than the end waits: by then the trial's files are closed."""
    hangs, go_on = threading.Event(), threading.Event()
    kept: list[Sample] = []

    def read() -> Sample:
        hangs.set()
        go_on.wait()
        return reading()

    with Sampler(read, kept.append) as sampler:
        assert hangs.wait(PATIENCE)
    go_on.set()
    wait_until(lambda: not sampling())
    assert (kept, sampler.samples) == ([], [])
