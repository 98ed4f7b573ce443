"""Square waves of load planted on cards whose energy is known exactly."""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Fault, Square, SyntheticCard, without

from benchmarks.square_figures import Planted, Row, Wave, by_period, largest_swing, page, rows
from benchmarks.square_wave import plant, read_readings, waves, write_readings
from lora_lab.telemetry.sampler import Sample, Sampler

HIGH, LOW = 500.0, 120.0
BEFORE, SECONDS, AFTER = 1.2, 4.5, 0.8
PERIODS = (0.04, 0.07, 0.1, 0.15, 0.25, 0.4)
DUTIES = (0.25, 0.5, 0.75)


def in_one_session(planned: list[Wave], late: float = 0.0, fault: Fault = list, **card: float) -> list[Row]:
    """Rows of waves that were planted one after the other, each on a synthetic card."""
    planted, samples = [], []
    for place, wave in enumerate(planned):
        began, periods = 100.0 * place, math.ceil(SECONDS / wave.period)
        first = math.ceil(BEFORE / wave.period)
        begins = [number * wave.period for number in range(first + periods + math.ceil(AFTER / wave.period))]
        loads = [(began + begin, wave.duty * wave.period) for begin in begins]
        planted.append(Planted(wave, loads[first][0], loads[first + periods][0], loads))
        power = Square(low=LOW, highest=HIGH, period=wave.period, duty=wave.duty, offset=late / wave.period)
        made = SyntheticCard(power=power, **card).samples(begins[-1] + wave.period)  # type: ignore[arg-type]
        samples += [replace(sample, t=began + sample.t) for sample in fault(made)]
    return rows(planted, samples)


ALL = waves(PERIODS, DUTIES, repeats=1, seed=0)
WHOLE = st.builds(Wave, period=st.floats(0.02, 0.6), duty=st.floats(0.05, 0.95))
ENDS = [Wave(0.4, 0.0), Wave(0.4, 1.0)]


@given(wave=WHOLE, tick=st.floats(0.02, 0.15), phase=st.floats(0, 1), jitter=st.floats(0, 0.9))
def test_what_is_expected_was_drawn_and_a_sound_counter_is_within_its_bound_of_it(
    wave: Wave, tick: float, phase: float, jitter: float
) -> None:
    row, rest, constant = in_one_session([wave, *ENDS], tick=tick, phase=phase, read_jitter=jitter)
    drawn = row["seconds"] * (LOW + (HIGH - LOW) * wave.duty)
    off = abs(rest["counter_ratio"] - 1) + abs(constant["counter_ratio"] - 1)
    assert off < 1e-9  # one repeat: they are their own mean
    assert row["duty"] == pytest.approx(wave.duty)
    assert row["period"] == pytest.approx(wave.period)
    edges = 2 * (tick + 0.1) / SECONDS
    assert row["expected_joules"] == pytest.approx(drawn, rel=edges)
    assert abs(row["counter"]["joules"] - drawn) <= row["counter"]["error_joules"] + 0.02


@pytest.mark.nightly
@given(wave=WHOLE, gain=st.floats(0.9, 1.1))
def test_a_gain_of_counter_and_power_alike_changes_no_ratio(wave: Wave, gain: float) -> None:
    plain = in_one_session([wave, *ENDS])[0]
    gained = in_one_session([wave, *ENDS], counter_gain=gain, power_gain=gain)[0]
    for name in ("counter_ratio", "instant_ratio", "average_ratio", "swing"):
        assert gained[name] == pytest.approx(plain[name], abs=1e-4)


@given(wave=WHOLE, tick=st.floats(0.02, 0.3))
def test_no_tick_differs_from_another_by_more_than_the_largest_swing(wave: Wave, tick: float) -> None:
    power = Square(low=0.0, highest=1.0, period=wave.period, duty=wave.duty, offset=0.0)
    begins = [number * wave.period / 400 for number in range(400)]
    per_tick = [power.joules(begin + tick) - power.joules(begin) for begin in begins]
    swing = (max(per_tick) - min(per_tick)) / tick
    most = largest_swing(wave.period, wave.duty, tick)
    assert swing <= most + 1e-9
    assert most <= swing + 2 * wave.period / 400 / tick


def test_a_complete_counter_swings_as_it_should_and_one_that_looks_now_and_then_swings_more() -> None:
    complete = in_one_session(ALL)
    for row in complete:
        assert row["swing"] <= row["swing_if_complete"] + 0.01
    partial = in_one_session(ALL, fault=looks_at_the_end_of_each_tick)
    short = [row for row in partial if row["period_asked"] == 0.07 and 0 < row["duty_asked"] < 1]
    assert all(row["swing"] > row["swing_if_complete"] + 0.3 for row in short)


def looks_at_the_end_of_each_tick(samples: list[Sample]) -> list[Sample]:
    """A counter that adds tick x the power at the tick: it takes a moment for all of the time since the last."""
    joules, made = 1000.0, []
    for before, sample in zip([samples[0], *samples], samples, strict=False):
        if sample.energy_joules != before.energy_joules:
            joules += 0.1 * (sample.instant_watts or 0.0)
        made.append(replace(sample, energy_joules=joules))
    return made


@pytest.mark.parametrize("late", [0.0, 0.1, 0.25])
def test_a_counter_that_is_published_late_is_found_to_be(late: float) -> None:
    found = in_one_session(ALL, late=late, phase=0.3, read_jitter=0.2)
    (delay,) = {row["delay_seconds"] for row in found}
    assert delay == pytest.approx(late, abs=0.03)


@pytest.mark.parametrize("period", PERIODS[1:-1])
def test_a_period_that_a_sensor_mistakes_is_off_the_line_and_a_cost_per_rise_is_not(period: float) -> None:
    made = in_one_session(ALL)
    for row in made:
        row["counter_ratio"] = 1 + 0.0005 / row["period"]  # each rise and fall costs the same
    assert all(abs(each["off_the_line"]) < 1e-9 for each in by_period(made, "counter"))
    for row in made:
        row["counter_ratio"] += 0.1 * (row["period_asked"] == period)
    off = {each["period"]: abs(each["off_the_line"]) for each in by_period(made, "counter")}
    assert max(off, key=lambda each: off[each]) == period
    assert 0.05 < off[period] <= 0.1


def test_without_a_counter_power_says_what_to_expect_and_without_energy_nothing_does() -> None:
    made = in_one_session(ALL, fault=without("energy_joules"))
    assert all(row["counter_ratio"] is None and row["counter"]["absent"] for row in made)
    for row in made:
        drawn = row["seconds"] * (LOW + (HIGH - LOW) * row["duty"])
        assert row["expected_joules"] == pytest.approx(drawn, rel=1e-6)
    assert "0 of 0 waves" in page(made)
    nothing = without("energy_joules", "instant_watts", "average_watts")
    with pytest.raises(ValueError, match="no energy of"):
        in_one_session(ALL, fault=nothing)


def test_each_repeat_has_every_wave_once_in_its_own_order_which_the_seed_decides() -> None:
    planned = waves(PERIODS, DUTIES, repeats=3, seed=7)
    assert planned == waves(PERIODS, DUTIES, repeats=3, seed=7)
    repeats = [[(wave.period, wave.duty) for wave in planned if wave.repeat == repeat] for repeat in range(3)]
    assert {tuple(sorted(each)) for each in repeats} == {tuple(sorted(repeats[0]))}
    assert len({tuple(each) for each in repeats}) == 3
    assert len(set(repeats[0])) == len(repeats[0]) == len(PERIODS) * len(DUTIES) + 2


@dataclass
class FakeCard:
    """A card that draws HIGH while it is kept busy, and says so at every reading."""

    joules: float = 0.0
    since: float = 0.0
    watts: float = LOW

    def draw(self, watts: float) -> float:
        now = time.monotonic()
        self.joules += self.watts * (now - (self.since or now))
        self.since, self.watts = now, watts
        return now

    def busy(self, seconds: float) -> float:
        began = self.draw(HIGH)
        time.sleep(seconds)
        return self.draw(LOW) - began

    def read(self, slow: bool) -> list[Sample]:
        return [Sample(t=self.draw(self.watts), energy_joules=self.joules, instant_watts=self.watts, sm_mhz=1500.0)]


def test_waves_are_planted_as_planned_and_their_energy_is_found_again_from_the_file(tmp_path: Path) -> None:
    card = FakeCard()
    with Sampler(card.read, rate_hz=200) as sampler:
        planted = [plant(wave, 0.5, card.busy, before=0.05, after=0.05) for wave in waves([0.02], [0.5], 1, seed=1)]
    found = {row["duty_asked"]: row for row in rows(planted, sampler.samples)}
    wave = found[0.5]
    assert wave["seconds"] > 0.499
    assert wave["period"] > 0.0199  # longer where others keep this machine busy
    assert 0 == found[0.0]["duty"] < wave["duty"] < found[1.0]["duty"] <= 1
    assert wave["counter_ratio"] == pytest.approx(1, abs=0.1)
    assert wave["sm_mhz"] == 1500.0
    write_readings(tmp_path / "readings.json.gz", planted, sampler.samples)
    again = rows(*read_readings(tmp_path / "readings.json.gz"))
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(list(found.values())))
    assert page(again).count("\n| ") > 4
