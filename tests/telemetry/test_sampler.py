"""The sampler outlives its sensor, and the trial outlives both."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.telemetry import sampler as sampler_module
from lora_lab.telemetry.sampler import BUSY_SHARE, RATE_HZ, SLOW_EVERY, Sample, Sampler, SensorFailed

RATE = 2000.0
PATIENCE = 10.0


def reading(slow: bool = True) -> list[Sample]:
    return [Sample(t=time.monotonic(), instant_watts=1.0)]


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

    def read(slow: bool) -> list[Sample]:
        next(asked)
        raise SensorFailed("GPU is lost")

    with Sampler(read, rate_hz=RATE) as sampler:
        wait_until(lambda: not sampling())
    assert sampler.fault == "GPU is lost"
    assert sampler.samples == []
    assert next(asked) < 100, "a dead sensor is not asked for ever"


def test_a_sensor_that_dies_in_a_trial_keeps_what_it_gave() -> None:
    asked = count()

    def read(slow: bool) -> list[Sample]:
        if next(asked) >= 5:
            raise SensorFailed("fell off the bus")
        return reading()

    with Sampler(read, rate_hz=RATE) as sampler:
        wait_until(lambda: not sampling())
    assert len(sampler.samples) == 5
    assert sampler.fault == "fell off the bus"


def test_a_trial_shorter_than_the_samplers_patience_still_learns_of_a_dead_sensor() -> None:
    asked = threading.Event()

    def read(slow: bool) -> list[Sample]:
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

    def read(slow: bool) -> list[Sample]:
        if fails[next(asked) % len(fails)]:
            raise SensorFailed("busy")
        return reading()

    with Sampler(read, rate_hz=RATE) as sampler:
        wait_until(lambda: len(sampler.samples) >= 60)
        assert sampling()


def test_a_sensor_that_has_recovered_has_no_fault() -> None:
    """`fault` is what the figures that need samples give as their reason: there is none while samples come."""
    asked = count()

    def read(slow: bool) -> list[Sample]:
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


def test_energy_and_power_are_read_twenty_times_a_second_and_the_slower_sensors_with_every_fifth() -> None:
    asked: list[bool] = []

    def read(slow: bool) -> list[Sample]:
        asked.append(slow)
        return reading()

    with Sampler(read) as sampler:
        wait_until(lambda: len(sampler.samples) >= 21)
    assert asked == [number % SLOW_EVERY == 0 for number in range(len(asked))]
    times = [sample.t for sample in sampler.samples]
    assert (times[20] - times[0]) * RATE_HZ == pytest.approx(20, rel=0.3)  # a shared machine stalls now and then


def work(cpu_seconds: float) -> None:
    end = time.thread_time() + cpu_seconds
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize("cost", [0.02, 0.05])
def test_however_much_a_reading_costs_looking_takes_a_quarter_of_a_core_at_most(cost: float) -> None:
    """Then there are fewer of them."""

    def read(slow: bool) -> list[Sample]:
        work(cost)
        return reading()

    with Sampler(read) as sampler:
        time.sleep(1.0)
    assert 2 <= len(sampler.samples) <= 1.0 * BUSY_SHARE / cost + 2
    assert sampler.cpu_seconds >= cost * len(sampler.samples)
    assert sampler.cpu_seconds <= BUSY_SHARE * sampler.seconds + 2 * cost


def test_a_cheap_reading_costs_next_to_nothing_and_keeps_its_rate() -> None:
    with Sampler(reading) as sampler:
        wait_until(lambda: len(sampler.samples) >= 12)
    assert sampler.cpu_seconds < 0.1 * sampler.seconds


def test_while_it_pauses_nothing_is_read_and_then_it_goes_on() -> None:
    asked = count()

    def read(slow: bool) -> list[Sample]:
        next(asked)
        return reading()

    with Sampler(read, rate_hz=200.0) as sampler:
        wait_until(lambda: len(sampler.samples) >= 5)
        sampler.pause(True)
        time.sleep(0.05)  # a reading may have been on its way
        kept = len(sampler.samples)
        time.sleep(0.2)
        assert len(sampler.samples) == kept
        assert sampling()
        sampler.pause(False)
        wait_until(lambda: len(sampler.samples) > kept + 5)
    assert next(asked) == len(sampler.samples)


def test_a_slow_reading_is_not_made_up_for_by_a_burst() -> None:
    """A burst would take the processor from the trial, and a hung driver makes for a long one."""
    asked = count()

    def read(slow: bool) -> list[Sample]:
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


def test_each_card_has_a_sample_in_every_reading() -> None:
    kept: list[Sample] = []

    def read(slow: bool) -> list[Sample]:
        return [*reading(), replace(*reading(), card=1)]

    with Sampler(read, kept.append, rate_hz=RATE) as sampler:
        wait_until(lambda: len(kept) >= 20)
    assert [sample.card for sample in kept] == [0, 1] * (len(kept) // 2)
    assert [Sample.decode(sample.encode()) for sample in kept] == sampler.samples


def test_what_a_failing_sensor_gave_before_is_kept_once() -> None:
    asked = count()
    kept: list[Sample] = []

    def read(slow: bool) -> list[Sample]:
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

    def read(slow: bool) -> list[Sample]:
        hangs.set()
        go_on.wait()
        return reading()

    with Sampler(read, kept.append) as sampler:
        assert hangs.wait(PATIENCE)
    go_on.set()
    wait_until(lambda: not sampling())
    assert (kept, sampler.samples) == ([], [])


VALUES = st.none() | st.floats(0, 1e9)
COUNTS = st.none() | st.integers(0, 2**40)


@given(
    sample=st.builds(
        Sample,
        t=st.floats(0, 1e9),
        energy_joules=VALUES,
        average_watts=VALUES,
        used_bytes=COUNTS,
        slowdowns=COUNTS,
        processes=st.none() | st.lists(st.tuples(st.integers(1, 2**22), COUNTS)).map(tuple),
    )
)
def test_a_sample_on_disk_is_the_same_sample(sample: Sample) -> None:
    assert Sample.decode(sample.encode()) == sample


def test_a_sampler_of_hours_keeps_its_newest_samples_and_reads_less_often_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler_module, "LONG_AFTER_SECONDS", 0.3)
    monkeypatch.setattr(sampler_module, "LONG_RATE_HZ", 20.0)
    kept: list[Sample] = []
    with Sampler(reading, kept.append, rate_hz=RATE, recent=5) as sampler:
        view = sampler.samples
        wait_until(lambda: kept != [] and kept[-1].t > kept[0].t + 0.8)
    assert sampler.taken == len(kept) > 20
    assert sampler.samples is view, "who looks through it sees new ones"
    assert list(view) == kept[-5:]
    assert (view[-1], view[:-3:-1], len(view)) == (kept[-1], [kept[-1], kept[-2]], 5)
    late = [after - before for before, after in pairwise(s.t for s in kept if s.t > kept[0].t + 0.4)]
    assert min(late) > 0.8 / 20 - 0.01, "a fifth earlier at most"
