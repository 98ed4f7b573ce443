"""Energy of a window against cards whose power is known exactly: within its error, or another source, or a reason."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from synthetic import (
    AVERAGE,
    CONSTANT,
    COUNTER,
    INSTANT,
    RAMP,
    READ_SECONDS,
    ROUNDING,
    Constant,
    Fault,
    Ramp,
    Square,
    SyntheticCard,
    frozen,
    jumped,
    reset,
    silent,
    squares,
    synthetic_cards,
    without,
    wrapped,
)

from lora_lab.telemetry.energy import AVERAGE_SECONDS, DISAGREEMENT_REFUSED, Energy, cpu_energy, window_energy
from lora_lab.telemetry.window import Window

ANY = CONSTANT | RAMP | squares(0.004, 20)
READ_OFTEN_ENOUGH = CONSTANT | RAMP | squares(0.5, 20, least_duty=0.25)
"""Each level of a wave lasts longer than the time between two readings."""
SLOWER_THAN_THE_MEAN = CONSTANT | RAMP | squares(4.8, 20, least_duty=0.25)
"""Each level lasts longer than the driver's mean goes back, and a reading more."""

STARTS, SECONDS = st.floats(1.5, 3), st.floats(5, 8)


def seen(card: SyntheticCard, start: float, seconds: float, *faults: Fault) -> Energy:
    samples = card.samples(start + seconds + 1)
    for fault in faults:
        samples = fault(samples)
    return window_energy(start, start + seconds, samples)


def bounds(energy: Energy) -> tuple[float, float]:
    assert energy.joules is not None
    assert energy.error_joules is not None, energy.reason
    return energy.joules - energy.error_joules - ROUNDING, energy.joules + energy.error_joules + ROUNDING


def refused(energy: Energy) -> str:
    assert (energy.joules, energy.error_joules, energy.source) == (None, None, "none")
    assert energy.reason
    return energy.reason


@given(card=synthetic_cards(ANY), start=STARTS, seconds=SECONDS)
def test_a_sound_counter_is_used_and_the_true_energy_lies_within_its_error(
    card: SyntheticCard, start: float, seconds: float
) -> None:
    """Waves faster than the readings too, though instant power may then show one level alone."""
    energy = seen(card, start, seconds)
    assert (energy.source, energy.reason) == ("counter", "")
    low, high = bounds(energy)
    assert low <= card.drawn(start, start + seconds) <= high
    assert energy.power is not None
    assert energy.disagreement == energy.power.joules / (energy.joules or 0) - 1


@given(card=synthetic_cards(READ_OFTEN_ENOUGH, gaps=0.1), start=STARTS, seconds=SECONDS)
def test_without_a_counter_instant_power_that_changes_slower_than_it_is_read_is_integrated_within_its_error(
    card: SyntheticCard, start: float, seconds: float
) -> None:
    """Limit: of a wave that changes twice between two readings, the error knows nothing."""
    energy = seen(card, start, seconds, without(COUNTER))
    assert (energy.source, energy.reason) == ("instant_power", "the card has no energy counter")
    low, high = bounds(energy)
    assert low <= card.drawn(start, start + seconds) <= high


@given(start=STARTS, late=st.floats(-0.2, 0.2), levels=st.tuples(st.floats(20, 700), st.floats(20, 700)))
def test_without_a_counter_power_that_changes_once_at_the_windows_edge_is_integrated_within_its_error(
    start: float, late: float, levels: tuple[float, float]
) -> None:
    """There, half of what lies between two readings is the window's, and the change may lie in it or not."""
    low, high = levels
    card = SyntheticCard(power=Square(low, high, 1000, 0.5, offset=(start + late) / 1000), phase=0.5)
    for missing in ((COUNTER,), (COUNTER, INSTANT)):
        least, most = bounds(seen(card, start, 5.0, without(*missing)))
        assert least <= card.drawn(start, start + 5.0) <= most


@given(card=synthetic_cards(SLOWER_THAN_THE_MEAN, gaps=0.1), start=STARTS, seconds=SECONDS)
def test_average_power_that_changes_slower_than_its_second_is_integrated_within_its_error(
    card: SyntheticCard, start: float, seconds: float
) -> None:
    """Limit: of a wave that changes within the driver's second, the error at the window's edges knows nothing."""
    energy = seen(card, start, seconds, without(COUNTER, INSTANT))
    assert (energy.source, energy.reason) == (
        "average_power",
        "the card has no energy counter; instant power was not read",
    )
    low, high = bounds(energy)
    assert low <= card.drawn(start, start + seconds) <= high


@given(start=STARTS, late=st.tuples(st.floats(-0.6, 0.6), st.floats(-0.6, 0.6)), high_within=st.booleans())
def test_average_power_that_changes_at_both_edges_is_integrated_within_its_error(
    start: float, late: tuple[float, float], high_within: bool
) -> None:
    """The two changes add up: as in a window between two pauses."""
    begin, seconds = start + late[0], 5.0 + late[1] - late[0]
    low, high = (60.0, 400.0) if high_within else (400.0, 60.0)
    card = SyntheticCard(power=Square(low, high, 1000, seconds / 1000, offset=begin / 1000), read_jitter=0.4)
    least, most = bounds(seen(card, start, 5.0, without(COUNTER, INSTANT)))
    assert least <= card.drawn(start, start + 5.0) <= most


@given(card=synthetic_cards(squares(0.01, 0.9)), start=STARTS, seconds=SECONDS)
def test_of_fast_waves_average_power_is_off_by_a_quarter_second_of_the_wave_at_most(
    card: SyntheticCard, start: float, seconds: float
) -> None:
    """Which is not in its error: the mean hides how high the wave is."""
    energy = seen(card, start, seconds, without(COUNTER, INSTANT))
    assert isinstance(card.power, Square)
    at_the_edges = AVERAGE_SECONDS / 4 * (card.power.highest - card.power.low)
    low, high = bounds(energy)
    assert low - at_the_edges <= card.drawn(start, start + seconds) <= high + at_the_edges


@given(power=CONSTANT | RAMP, start=STARTS, seconds=SECONDS, missing=st.sampled_from([(COUNTER,), (COUNTER, INSTANT)]))
def test_power_that_is_constant_or_rises_steadily_is_integrated_exactly(
    power: Constant | Ramp, start: float, seconds: float, missing: tuple[str, ...]
) -> None:
    card = SyntheticCard(power=power, read_jitter=0.5)
    assert seen(card, start, seconds, without(*missing)).joules == pytest.approx(
        card.drawn(start, start + seconds), rel=1e-4
    )


def test_idle_draw_counts() -> None:
    """A card that does nothing at 126 W still costs 126 J a second."""
    assert seen(SyntheticCard(power=Constant(126.0)), 1.0, 10.0).joules == pytest.approx(1260, rel=0.01)


@given(watts=st.floats(60, 700), gain=st.floats(0.5, 2.0), offset=st.floats(-20, 20), start=STARTS)
def test_a_counter_that_disagrees_with_power_by_more_than_a_tenth_is_not_used_and_the_run_says_so(
    watts: float, gain: float, offset: float, start: float
) -> None:
    card = SyntheticCard(power=Constant(watts), power_gain=gain, power_offset=offset, read_jitter=0.3)
    energy = seen(card, start, 10.0)
    power = gain * watts + offset
    apart = abs(power - watts) / max(power, watts)
    assume(abs(apart - DISAGREEMENT_REFUSED) > 0.03)  # the counter's own error
    if apart < DISAGREEMENT_REFUSED:
        assert energy.source == "counter"
        assert energy.disagreement == pytest.approx(power / watts - 1, abs=0.02)
    else:
        assert energy.source == "instant_power"
        assert energy.joules == pytest.approx(power * 10, rel=1e-3)
        assert "10% apart" in energy.reason


@pytest.mark.parametrize("duty", [0.1, 0.5])
@pytest.mark.parametrize("period", [READ_SECONDS, READ_SECONDS / 2])
def test_a_wave_in_step_with_the_readings_does_not_turn_a_sound_counter_down(period: float, duty: float) -> None:
    """Instant power then shows one level alone; the driver's mean shows that the counter is right."""
    card = SyntheticCard(power=Square(60, 600, period, duty, offset=0.95))
    energy = seen(card, 2.0, 8.0)
    assert energy.source == "counter"
    low, high = bounds(energy)
    assert low <= card.drawn(2.0, 10.0) <= high


START, END = 2.0, 9.0
MOMENTS = st.floats(0.0, END + 1)
SOMETHING = st.sets(st.sampled_from([COUNTER, INSTANT, AVERAGE]), min_size=1)
FAULTS = st.one_of(
    st.builds(frozen, MOMENTS, st.floats(0.3, 9), st.booleans()),
    st.builds(reset, MOMENTS),
    st.builds(wrapped, MOMENTS),
    st.builds(jumped, MOMENTS, st.floats(-5000, 5000)),
    st.builds(lambda names: without(*names), SOMETHING),
    st.builds(lambda names, since: without(*names, since=since), SOMETHING, MOMENTS),
    st.builds(silent, MOMENTS),
)


@given(card=synthetic_cards(SLOWER_THAN_THE_MEAN), faults=st.lists(FAULTS, min_size=1, max_size=3))
def test_every_fault_ends_in_a_reason_or_in_a_source_that_is_named_and_holds(
    card: SyntheticCard, faults: list[Fault]
) -> None:
    """Limit: a counter that loses or gains less than a tenth is used; with no power beside it, any that rises."""
    assume(card.already > 1000)  # else what a reset takes away is less than one tick brings
    energy = seen(card, START, END - START, *faults)
    if energy.source == "none":
        refused(energy)
        return
    low, high = bounds(energy)
    true = card.drawn(START, END)
    if energy.source == "counter":
        assert energy.reason == ""
        if energy.power is not None:
            room = DISAGREEMENT_REFUSED * max(energy.joules or 0, true) / (1 - DISAGREEMENT_REFUSED)
            room += energy.power.error_joules * 2 + ROUNDING
            assert low - room <= true <= high + room
    else:
        assert energy.reason, "why it is not the counter's"
        assert low <= true <= high


@given(card=synthetic_cards(SLOWER_THAN_THE_MEAN), since=st.floats(0, END), power=st.sampled_from([INSTANT, AVERAGE]))
def test_when_the_best_sources_fall_silent_on_the_way_the_next_one_that_saw_it_all_is_used(
    card: SyntheticCard, since: float, power: str
) -> None:
    lost = (COUNTER,) if power == INSTANT else (COUNTER, INSTANT)
    energy = seen(card, START, END - START, without(*lost, since=since))
    assert energy.source == {INSTANT: "instant_power", AVERAGE: "average_power"}[power]
    assert "counter" in energy.reason
    assert power == INSTANT or "instant" in energy.reason
    low, high = bounds(energy)
    assert low <= card.drawn(START, END) <= high


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (frozen(4.0, 3.0, catches_up=True), "stood still for 3.0"),
        (frozen(0.0, 99.0, catches_up=False), "stood still for 7.0"),
        (reset(5.0), "backwards"),
        (wrapped(5.0), "backwards"),
        (jumped(5.0, 3000.0), "apart"),
        (without(COUNTER), "no energy counter"),
        (without(COUNTER, since=2.5), "both sides"),
    ],
)
@pytest.mark.parametrize(
    ("missing", "source"), [((), "instant_power"), ((INSTANT,), "average_power"), ((INSTANT, AVERAGE), "none")]
)
def test_each_fault_of_the_counter_is_named_and_the_next_source_is_used(
    fault: Fault, reason: str, missing: tuple[str, ...], source: str
) -> None:
    if (source, reason) == ("none", "apart"):
        source, reason = "counter", ""  # a limit: nothing is there to disagree with
    energy = seen(SyntheticCard(power=Constant(300.0), phase=0.5), START, END - START, fault, without(*missing))
    assert energy.source == source
    assert reason in energy.reason
    assert energy.joules is None or source == "counter" or energy.joules == pytest.approx(2100.0)


@given(card=synthetic_cards(ANY), ticks=st.floats(0.1, 18), start=STARTS)
def test_a_window_of_few_ticks_has_no_energy_and_power_is_no_way_out(
    card: SyntheticCard, ticks: float, start: float
) -> None:
    assert "fewer than 20" in refused(seen(card, start, ticks * card.tick))


@given(start=STARTS, seconds=st.floats(0.05, 0.9), counts=st.booleans())
def test_power_that_was_read_fewer_than_twenty_times_is_not_integrated(
    start: float, seconds: float, counts: bool
) -> None:
    card = SyntheticCard(power=Constant(300.0))
    assert "fewer than 20" in refused(seen(card, start, seconds, without(*([] if counts else [COUNTER]))))


@given(at=st.floats(START - 1, END), seconds=st.floats(1.2, 3), missing=st.sampled_from([INSTANT, AVERAGE]))
def test_power_that_was_not_read_for_more_than_a_second_is_not_integrated(
    at: float, seconds: float, missing: str
) -> None:
    """Nobody knows what it was; also where a part of that time lies outside the window."""
    card = SyntheticCard(power=Constant(300.0), gaps=((at, seconds),))
    late = AVERAGE_SECONDS / 2 if missing == INSTANT else 0.0
    assume(at + seconds > START + late + READ_SECONDS)
    assume(at < END + late - READ_SECONDS)
    assert "power was not read" in refused(seen(card, START, END - START, without(COUNTER, missing)))


@pytest.mark.parametrize("missing", [(), (COUNTER,), (COUNTER, INSTANT)])
@pytest.mark.parametrize(("first", "last"), [(2.0, 9.9), (0.0, 5.0), (2.0, 5.0), (9.0, 9.9)])
def test_a_window_that_was_not_covered_has_no_energy(missing: tuple[str, ...], first: float, last: float) -> None:
    card = SyntheticCard(power=Constant(300.0), read_jitter=0.2)
    samples = without(*missing)([sample for sample in card.samples(10.0) if first <= sample.t <= last])
    refused(window_energy(1.0, 8.0, samples))


def test_a_card_that_was_never_read_or_offers_no_sensor_has_no_energy() -> None:
    refused(window_energy(0.0, 1.0, []))
    card = SyntheticCard(power=Constant(300.0))
    assert "counter" in refused(seen(card, 1.0, 5.0, without(COUNTER, INSTANT, AVERAGE)))
    assert "power" in refused(seen(card, 1.0, 5.0, without(COUNTER, INSTANT, AVERAGE)))


@given(card=synthetic_cards(ANY), start=STARTS, seconds=SECONDS)
def test_the_cpus_energy_is_its_counters_alone(card: SyntheticCard, start: float, seconds: float) -> None:
    samples = [replace(s, cpu_joules=s.energy_joules, energy_joules=None) for s in card.samples(start + seconds + 1)]
    window = Window(start, start + seconds, ())
    found = cpu_energy(window, samples)
    assert not isinstance(found, str)
    assert abs(found.joules - card.drawn(start, start + seconds)) <= found.error_joules + ROUNDING
    assert cpu_energy(window, without("cpu_joules")(samples)) == "no CPU energy was read"
    lost = cpu_energy(window, without("cpu_joules", since=start + 1)(samples))
    assert isinstance(lost, str)
    assert lost
