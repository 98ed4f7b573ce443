"""A running counter between two moments, against cards whose energy is known exactly."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from synthetic import (
    CONSTANT,
    RAMP,
    READ_SECONDS,
    ROUNDING,
    Constant,
    Fault,
    SyntheticCard,
    frozen,
    reset,
    squares,
    synthetic_cards,
    without,
    wrapped,
)

from lora_lab.telemetry.counter import FEWEST_TICKS, CounterFault, Measured, TooFewTicks, between
from lora_lab.telemetry.sampler import Sample

ANY = CONSTANT | RAMP | squares(0.004, 20)
"""Waves from well above the tick to well below."""


def readings(samples: list[Sample]) -> list[tuple[float, float]]:
    return [(sample.t, sample.energy_joules) for sample in samples if sample.energy_joules is not None]


def measured(card: SyntheticCard, start: float, end: float, fault: Fault = list) -> Measured:
    return between(start, end, readings(fault(card.samples(end + 1.5))))


def sure_ticks(card: SyntheticCard, seconds: float) -> float:
    """As many are seen in a window for certain."""
    apart = max(card.tick * (1 + card.tick_jitter), card.tick + 2 * READ_SECONDS)
    return (seconds - sum(gap for _, gap in card.gaps)) / apart - 2


@given(card=synthetic_cards(ANY, gaps=2.0), start=st.floats(0.5, 3), seconds=st.floats(0.5, 8))
def test_whatever_the_power_does_the_true_energy_lies_within_the_error(
    card: SyntheticCard, start: float, seconds: float
) -> None:
    try:
        found = measured(card, start, start + seconds)
    except TooFewTicks:
        assert sure_ticks(card, seconds) < FEWEST_TICKS
        return
    except CounterFault:  # a gap over an edge that nothing was read beyond
        assert card.gaps
        return
    assert abs(found.joules - card.drawn(start, start + seconds)) <= found.error_joules + ROUNDING


@given(card=synthetic_cards(ANY), start=st.floats(0.5, 3), seconds=st.floats(5, 8))
def test_the_error_is_no_more_than_a_few_ticks_and_readings_of_energy(
    card: SyntheticCard, start: float, seconds: float
) -> None:
    assume(sure_ticks(card, seconds) >= FEWEST_TICKS)
    longest = card.tick * (1 + card.tick_jitter) + 2 * READ_SECONDS * (1 + card.read_jitter)
    assert measured(card, start, start + seconds).error_joules <= 4 * longest * card.power.highest + ROUNDING


@given(card=synthetic_cards(ANY), start=st.floats(0.5, 2), seconds=st.tuples(st.floats(5, 6), st.floats(5, 6)))
def test_two_windows_end_to_end_draw_what_both_draw_as_one(
    card: SyntheticCard, start: float, seconds: tuple[float, float]
) -> None:
    assume(min(sure_ticks(card, each) for each in seconds) >= FEWEST_TICKS)
    middle, end = start + seconds[0], start + sum(seconds)
    apart = [measured(card, a, b).joules for a, b in ((start, middle), (middle, end))]
    assert sum(apart) == pytest.approx(measured(card, start, end).joules, rel=1e-9)


STEADY = synthetic_cards(CONSTANT | squares(0.004, 0.5))
START, END = 2.0, 9.0


@given(card=STEADY, at=st.floats(START, END - 0.5), fault=st.sampled_from([reset, wrapped]))
def test_a_counter_that_begins_again_within_the_window_is_refused(
    card: SyntheticCard, at: float, fault: type[Fault]
) -> None:
    assume(card.already > 500)  # else what it lost is less than one tick brings
    with pytest.raises(CounterFault, match="backwards"):
        measured(card, START, END, fault(at))


# up to 0.8: a counter that stands still for 0.9 s is only sound again with its next tick, up to 0.2 s later
@given(card=STEADY, at=st.one_of(st.floats(0, 0.8), st.floats(9.8, 10.4)), fault=st.sampled_from([reset, wrapped]))
def test_what_a_counter_does_well_outside_the_window_is_of_no_concern(
    card: SyntheticCard, at: float, fault: type[Fault]
) -> None:
    sound = measured(card, START, END)
    assert measured(card, START, END, fault(at)).joules == pytest.approx(sound.joules, abs=0.01)
    assert measured(card, START, END, frozen(at, 0.9, catches_up=False)).joules == pytest.approx(sound.joules, abs=0.01)


@given(card=STEADY, at=st.floats(START + 0.1, END - 1.8), seconds=st.floats(1.6, 20), catches_up=st.booleans())
def test_a_counter_that_stands_still_within_the_window_is_refused(
    card: SyntheticCard, at: float, seconds: float, catches_up: bool
) -> None:
    assume(seconds > 6 * card.tick * (1 + card.tick_jitter) + 2 * READ_SECONDS)
    with pytest.raises(CounterFault, match="stood still"):
        measured(card, START, END, frozen(at, seconds, catches_up))


@given(card=STEADY, at=st.floats(1, 10), seconds=st.floats(0, 2))
def test_a_counter_that_stands_still_for_a_moment_and_catches_up_costs_no_accuracy(
    card: SyntheticCard, at: float, seconds: float
) -> None:
    try:
        found = measured(card, START, END, frozen(at, seconds, catches_up=True))
    except (CounterFault, TooFewTicks):
        assert seconds > 0.7 or sure_ticks(card, END - START - seconds) < FEWEST_TICKS
        return
    assert abs(found.joules - card.drawn(START, END)) <= found.error_joules + ROUNDING


@given(seconds=st.floats(1.2, 4))
def test_a_counter_that_was_not_looked_at_for_a_while_has_not_stood_still(seconds: float) -> None:
    card = SyntheticCard(power=Constant(300.0), gaps=((4.0, seconds),))
    found = measured(card, START, END)
    assert found.joules == pytest.approx(card.drawn(START, END), rel=0.01)


@given(since=st.floats(0, END))
def test_a_counter_that_is_no_longer_there_at_the_windows_end_is_refused_not_called_slow(since: float) -> None:
    """Were it called slow, the power that was read all the time would not be used either."""
    with pytest.raises(CounterFault, match=r"both sides|stood still"):
        measured(SyntheticCard(power=Constant(300.0)), START, END, without("energy_joules", since=since))


@given(card=synthetic_cards(ANY), ticks=st.floats(0.1, FEWEST_TICKS - 2))
def test_fewer_than_twenty_ticks_are_too_few(card: SyntheticCard, ticks: float) -> None:
    with pytest.raises(TooFewTicks, match=f"fewer than {FEWEST_TICKS}"):
        measured(card, START, START + ticks * card.tick)
