"""What a card draws at rest, on a clock that does not keep anybody waiting."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_lab.placement import Placement
from lora_lab.store.process_id import this_process
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.telemetry.host_facts import HostFacts, Idle
from lora_lab.telemetry.idle_draw import idle_draw
from lora_lab.telemetry.nvml import Card
from lora_lab.telemetry.sampler import RATE_HZ, Sample, SensorFailed
from lora_lab.trial import idle_power
from lora_lab.trial.idle_power import LONGEST_SECONDS, keep_for_block, measure_idle, of_block

TICK = 0.1
CARD = Card(
    index=0, uuid="GPU-1", name="Fake Card 0", total_bytes=2**33, compute_capability=(8, 6), driver="fake-driver"
)
ON_CARD = Placement(cards=(CARD,))


@dataclass
class Clock:
    """Stands for the module `time`."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def time(self) -> float:
        return 1.7e9 + self.now


@dataclass
class RestingCard:
    """A card that has drawn `joules(t)` by the time t since it is looked at."""

    joules: Callable[[float], float]
    clock: Any
    missing: tuple[str, ...] = ()
    silent_after: float = math.inf
    name: str = CARD.name
    begin: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.clock.monotonic()

    def sample(self, slow: bool) -> Sample:
        t = self.clock.monotonic() - self.begin
        if t > self.silent_after:
            raise SensorFailed("GPU is lost")
        seen = Sample(
            t=self.clock.monotonic(),
            energy_joules=round(1e6 + self.joules(t - t % TICK), 3),
            instant_watts=(self.joules(t + 1e-3) - self.joules(t - 1e-3)) / 2e-3,
            average_watts=self.joules(t) - self.joules(t - 1),
            temperature_celsius=41.0 if slow else None,
            sm_mhz=210.0 if slow else None,
        )
        return replace(seen, **dict.fromkeys(self.missing))


class OnTime:
    """A sampler whose readings come when they are due, whatever the machine does meanwhile."""

    def __init__(self, read: Callable[[bool], list[Sample]], clock: Clock) -> None:
        self._read, self._clock, self._begin = read, clock, clock.now
        self._samples: list[Sample] = []
        self.fault: str | None = None

    def __enter__(self) -> "OnTime":
        return self

    def __exit__(self, *_: object) -> None:
        return

    @property
    def samples(self) -> list[Sample]:
        now = self._clock.now
        while (t := self._begin + (len(self._samples) + 0.5) / RATE_HZ) < now and self.fault is None:
            self._clock.now = t
            try:
                self._samples += self._read(len(self._samples) % 5 == 0)
            except SensorFailed as error:
                self.fault = str(error)
        self._clock.now = now
        return self._samples


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(idle_power, "time", made)
    monkeypatch.setattr(idle_power, "pause", made.sleep)
    monkeypatch.setattr(idle_power, "Sampler", lambda read: OnTime(read, made))
    return made


def measured(card: RestingCard, seconds: float = 5.0) -> Idle | str:
    told = measure_idle(Placement(cards=(card,)), seconds, lambda _: None)  # type: ignore[arg-type]
    if isinstance(told, str):
        return told
    watched, samples = told
    assert idle_draw(watched.start, watched.end, samples) == (watched.watts, watched.error_watts, watched.source)
    return watched


def found(card: RestingCard, seconds: float = 5.0) -> Idle:
    told = measured(card, seconds)
    assert isinstance(told, Idle), told
    return told


def at(watts: float) -> Callable[[float], float]:
    return lambda t: watts * t


def coming_to_rest(rest: float, above: float, seconds: float) -> Callable[[float], float]:
    """It falls to `rest` from so much above, a factor e every so many seconds."""
    return lambda t: rest * t - above * seconds * math.expm1(-t / seconds)


@pytest.mark.parametrize("seconds", [3.0, 5.0])
@pytest.mark.parametrize(
    ("missing", "source", "rest"),
    [
        ((), "counter", "at rest"),
        (("energy_joules",), "instant_power", "at rest"),
        (("energy_joules", "instant_watts"), "average_power", "at rest"),
        (("instant_watts", "average_watts"), "counter", "whether at rest is not known"),
    ],
)
def test_a_card_at_rest_is_watched_once_and_its_draw_lies_within_the_error(
    clock: Clock, seconds: float, missing: tuple[str, ...], source: str, rest: str
) -> None:
    begin = clock.now
    told = found(RestingCard(at(62.5), clock, missing), seconds)
    assert abs(told.watts - 62.5) <= told.error_watts + 1e-3
    assert told.error_watts <= 2 * 62.5 * 3 * TICK / seconds
    assert (told.source, told.state) == (
        source,
        f"no process on the card, {rest}, 41 degrees C, SM clock 210 MHz",
    )
    assert clock.now - begin <= seconds + 3
    assert told.measured_ms == pytest.approx(clock.time() * 1e3)


def test_the_draw_of_two_cards_is_that_of_both_together(clock: Clock) -> None:
    both = Placement(cards=(RestingCard(at(62.5), clock), RestingCard(at(40.0), clock)))  # type: ignore[arg-type]
    told = measure_idle(both, 5.0, lambda _: None)
    assert not isinstance(told, str)
    assert abs(told[0].watts - 102.5) <= told[0].error_watts + 1e-3
    assert {sample.card for sample in told[1]} == {0, 1}


@pytest.mark.parametrize("cooling", [0.5, 2.0])
def test_a_card_that_has_just_worked_is_watched_until_it_has_come_to_rest(clock: Clock, cooling: float) -> None:
    """Limit: what falls by a factor e in longer than half the measurement looks at rest while it is not."""
    told = found(RestingCard(coming_to_rest(60.0, 300.0, cooling), clock))
    assert ", at rest," in told.state
    assert told.watts == pytest.approx(60.0, rel=0.05)


def test_a_card_that_does_not_come_to_rest_says_so_after_half_a_minute(clock: Clock) -> None:
    begin = clock.now
    told = found(RestingCard(lambda t: 60.0 * t + 2.5 * t * t, clock))
    assert "still coming to rest" in told.state
    assert LONGEST_SECONDS < clock.now - begin < LONGEST_SECONDS + 10


def test_a_measurement_too_short_for_the_counter_is_none(clock: Clock) -> None:
    assert "ticks" in str(measured(RestingCard(at(60.0), clock), 1.0))


def test_a_card_without_sensors_of_energy_or_one_that_falls_silent_is_told_with_the_reason(clock: Clock) -> None:
    none = ("energy_joules", "instant_watts", "average_watts")
    assert "no energy counter" in str(measured(RestingCard(at(60.0), clock, none)))
    for silent_after in (0.0, 3.0):
        assert measured(RestingCard(at(60.0), clock, silent_after=silent_after)) == "GPU is lost"


def test_a_real_clock_and_a_real_sampler_measure_the_same() -> None:
    told = found(RestingCard(at(62.5), SimpleNamespace(monotonic=time.monotonic)), 2.5)
    assert abs(told.watts - 62.5) <= told.error_watts + 1e-3
    assert told.source == "counter"


IDLE = Idle(watts=62.5, error_watts=0.5, source="counter", start=0.0, end=5.0, state="at rest", measured_ms=1)


READINGS = [Sample(t=t / 20, energy_joules=62.5 * t / 20) for t in range(120)]


def watched_by(sweep: Path, name: str, idle: Idle) -> Path:
    """The folder of a trial that has measured the idle draw."""
    folder = sweep / name
    folder.mkdir()
    TrialFolder(folder).keep_idle(idle, READINGS, HostFacts())
    return folder


def test_the_other_trials_of_a_block_get_what_its_first_one_measured(tmp_path: Path) -> None:
    owner = this_process()
    assert of_block(tmp_path, ON_CARD, 0, owner) is None
    keep_for_block(watched_by(tmp_path, "0000", IDLE), ON_CARD, 0, owner)
    keep_for_block(watched_by(tmp_path, "0003", replace(IDLE, watts=70.0)), ON_CARD, 1, owner)
    assert of_block(tmp_path, ON_CARD, 0, owner) == (IDLE, READINGS)
    assert of_block(tmp_path, ON_CARD, 1, owner) == (replace(IDLE, watts=70.0), READINGS)


def test_another_block_card_or_start_of_the_sweep_measures_its_own(tmp_path: Path) -> None:
    """Hours may lie between, and a card is not as warm at night."""
    owner = this_process()
    keep_for_block(watched_by(tmp_path, "0000", IDLE), ON_CARD, 0, owner)
    assert of_block(tmp_path, ON_CARD, 1, owner) is None
    assert of_block(tmp_path, Placement(cards=(replace(CARD, uuid="GPU-2"),)), 0, owner) is None
    assert of_block(tmp_path, ON_CARD, 0, replace(owner, started=owner.started + 1)) is None


def test_what_was_lost_is_measured_anew(tmp_path: Path) -> None:
    owner = this_process()
    trial = watched_by(tmp_path, "0000", IDLE)
    keep_for_block(trial, ON_CARD, 0, owner)
    (trial / "idle.jsonl").unlink()
    assert of_block(tmp_path, ON_CARD, 0, owner) is None
    (tmp_path / "idle.json").write_text("{")
    assert of_block(tmp_path, ON_CARD, 0, owner) is None
