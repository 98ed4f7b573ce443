"""A trial's energy as it is recorded: gross, net of idle, of the CPU, and apart from these what the user stated."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import (
    AVERAGE,
    COUNTER,
    INSTANT,
    ROUNDING,
    Constant,
    Fault,
    Square,
    SyntheticCard,
    frozen,
    reset,
    silent,
    squares,
    step,
    synthetic_cards,
    window_of,
    without,
)

from lora_lab.events import Event
from lora_lab.telemetry.energy import window_energy
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.host_facts import HostFacts, Idle, Stated
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.summary import summarise

GROSS, NET, CPU = "energy/joules_per_token", "energy/net_joules_per_token", "energy/cpu_joules_per_token"
COST, CO2 = "cost/card_per_million_tokens", "co2/card_grams_per_million_tokens"

START, STEPS, REAL = 2.0, 40, 1000
SECONDS = 8.0
TOKENS = STEPS * REAL
EVENTS = window_of(START, [step(number, SECONDS / STEPS, REAL) for number in range(1, STEPS + 1)])
CARD = SyntheticCard(power=Constant(300.0), phase=0.3, read_jitter=0.3)
IDLE = Idle(watts=60.0, error_watts=0.5, source="counter", start=0.0, end=5.0, state="at rest", measured_ms=1)


def figures(
    card: SyntheticCard = CARD, *faults: Fault, seen: HostFacts | None = None, events: Sequence[Event] = EVENTS
) -> Summary:
    samples = card.samples(START + SECONDS + 1)
    for fault in faults:
        samples = fault(samples)
    return summarise(events, samples, seen or HostFacts(idle=IDLE), asked_t=0.0)


def test_all_figures_of_a_card_at_300_watts() -> None:
    found = figures()
    told = {name: value for name, value in found.metrics.items() if name.startswith("energy/")}
    expected = {
        "energy/joules": 2400.0,
        "energy/mean_power_watts": 300.0,
        GROSS: 0.06,
        "energy/power_integral_joules": 2400.0,
        "energy/idle_watts": 60.0,
        "energy/net_joules": 1920.0,
        NET: 0.048,
    }
    assert {name: told[name] for name in expected} == pytest.approx(expected, rel=0.02)
    others = {"energy/power_disagreement", *(f"{name}_error" for name in expected if "mean" not in name)}
    assert told.keys() == expected.keys() | others
    assert 0 < told[f"{GROSS}_error"] < told[f"{NET}_error"] < 0.004
    assert found.tags["energy_source"] == "counter"
    assert (found.tags["idle_state"], found.tags["idle_source"]) == ("at rest", "counter")


@given(
    card=synthetic_cards(squares(0.004, 20)),
    resting=st.builds(SyntheticCard, power=st.builds(Constant, st.floats(5, 130)), tick=st.floats(0.01, 0.2)),
    length=st.floats(5, 10),
)
def test_gross_and_net_of_idle_hold_the_truth_within_their_errors(
    card: SyntheticCard, resting: SyntheticCard, length: float
) -> None:
    """Net: what the same card would not have drawn at rest, with idle as it was measured before."""
    rest = window_energy(2.0, 2.0 + length, resting.samples(length + 4))
    assert rest.joules is not None
    assert rest.error_joules is not None
    idle = replace(IDLE, watts=rest.joules / length, error_watts=rest.error_joules / length)
    metrics = figures(card, seen=HostFacts(idle=idle)).metrics
    gross = card.drawn(START, START + SECONDS)
    net = gross - resting.power.joules(SECONDS)
    for name, true in ((GROSS, gross), (NET, net)):
        assert abs(metrics[name] * TOKENS - true) <= metrics[f"{name}_error"] * TOKENS + 2 * ROUNDING
    assert metrics["energy/joules"] == pytest.approx(metrics[GROSS] * TOKENS)
    assert metrics["energy/net_joules"] == pytest.approx(metrics[NET] * TOKENS)


def test_without_an_idle_draw_there_is_no_net_figure_but_why() -> None:
    found = figures(seen=HostFacts(no_idle="measure.idle_seconds=0"))
    assert GROSS in found.metrics
    assert "measure.idle_seconds=0" in found.absent[NET]
    assert not [name for name in found.metrics if "idle" in name or "net" in name]


UNMEASURED = [
    without(COUNTER, INSTANT, AVERAGE),
    without(COUNTER, INSTANT, AVERAGE, since=START + 1),
    silent(START + SECONDS / 2),
    silent(0.0),
]
STATED = Stated(board_power_watts=250.0, price_per_kwh=0.36, co2_grams_per_kwh=380.0)


@pytest.mark.parametrize("fault", UNMEASURED)
def test_what_was_only_stated_never_stands_in_a_measured_column(fault: Fault) -> None:
    found = figures(CARD, fault, seen=HostFacts(idle=IDLE, stated=STATED))
    told = {name for name in found.metrics if name.split("/")[0] in ("energy", "cost", "co2")}
    assert told == {"energy/estimated_joules", "energy/estimated_joules_per_token"}
    assert found.metrics["energy/estimated_joules"] == pytest.approx(250.0 * SECONDS)
    for name in (GROSS, NET, COST, CO2):
        assert found.absent[name]
    assert found.tags["energy_source"] == "none"
    assert "efficientllm/aec_watts" not in found.metrics


@given(watts=st.floats(1, 1000), price=st.floats(0.01, 2), grams=st.floats(1, 900))
def test_what_was_stated_changes_no_measured_figure(watts: float, price: float, grams: float) -> None:
    plain = figures().metrics
    given_all = figures(
        seen=HostFacts(idle=IDLE, stated=Stated(board_power_watts=watts, price_per_kwh=price, co2_grams_per_kwh=grams))
    ).metrics
    assert {name: given_all[name] for name in plain} == plain
    assert given_all.keys() - plain.keys() == {
        "energy/estimated_joules",
        "energy/estimated_joules_per_token",
        COST,
        CO2,
    }
    assert given_all["energy/estimated_joules_per_token"] == pytest.approx(watts * SECONDS / TOKENS)
    kwh_per_million = plain[GROSS] * 1e6 / 3.6e6
    assert given_all[COST] == pytest.approx(kwh_per_million * price)
    assert given_all[CO2] == pytest.approx(kwh_per_million * grams)


@pytest.mark.parametrize(
    ("stated", "asked"), [(Stated(), set()), (Stated(price_per_kwh=0.36), {COST}), (STATED, {COST, CO2})]
)
@pytest.mark.parametrize("case", ["measured", "no power", "no window"])
def test_cost_and_co2_are_there_or_absent_with_a_reason_only_when_asked_for(
    stated: Stated, asked: set[str], case: str
) -> None:
    faults = [without(COUNTER, INSTANT, AVERAGE)] if case == "no power" else []
    found = figures(CARD, *faults, seen=HostFacts(stated=stated), events=EVENTS[: -1 if case == "no window" else None])
    there = found.metrics if case == "measured" else found.absent
    assert {COST, CO2} & (found.metrics.keys() | found.absent.keys()) == asked
    assert asked <= there.keys()
    assert all(there[name] for name in asked)


@pytest.mark.parametrize(
    ("faults", "source", "reason"),
    [
        ([reset(5.0)], "instant_power", "backwards"),
        ([frozen(4.0, 3.0, True)], "instant_power", "stood still"),
        ([without(COUNTER)], "instant_power", "no energy counter"),
        ([without(COUNTER, INSTANT)], "average_power", "no energy counter"),
    ],
)
def test_a_source_that_is_not_the_counter_is_named_with_its_reason(
    faults: list[Fault], source: str, reason: str
) -> None:
    found = figures(CARD, *faults)
    assert found.tags["energy_source"] == source
    assert reason in found.tags["energy_source_reason"]
    assert any(reason in warning for warning in found.warnings)
    assert found.metrics[GROSS] == pytest.approx(0.06)
    assert "energy/power_disagreement" not in found.metrics


def test_a_power_of_zero_watts_is_a_reading() -> None:
    """Cards at rest do say so."""
    found = figures(replace(CARD, power=Constant(0.0)), without(COUNTER), seen=HostFacts())
    assert found.metrics["energy/joules"] == 0.0
    assert found.tags["energy_source"] == "instant_power"


@pytest.mark.parametrize(("gain", "told"), [(1.02, False), (0.98, False), (1.06, True), (0.94, True)])
def test_a_disagreement_of_more_than_three_percent_is_warned_of(gain: float, told: bool) -> None:
    found = figures(replace(CARD, power_gain=gain))
    assert found.tags["energy_source"] == "counter"
    assert found.metrics["energy/power_disagreement"] == pytest.approx(gain - 1, abs=0.005)
    assert any("off the energy counter" in warning for warning in found.warnings) == told


def test_too_short_a_window_has_its_reason_and_no_energy_per_token() -> None:
    events = window_of(START, [step(number, 0.3) for number in range(1, 6)])
    found = figures(events=events)
    assert "ticks" in found.absent[GROSS]
    assert "ticks" in found.absent[NET]
    assert not {GROSS, NET, "energy/joules"} & found.metrics.keys()


def test_a_sensor_that_failed_after_the_window_is_not_blamed_for_a_short_one() -> None:
    events = window_of(START, [step(number, 0.3) for number in range(1, 6)])
    found = figures(CARD, silent(6.0), events=events, seen=HostFacts(no_sensor="the sensor failed (GPU is lost)"))
    assert "ticks" in found.absent[GROSS]
    found = figures(CARD, silent(6.0), seen=HostFacts(no_sensor="the sensor failed (GPU is lost)"))
    assert found.absent[GROSS] == "the sensor failed (GPU is lost)"


def with_cpu(samples: list[Sample]) -> list[Sample]:
    return [replace(s, cpu_joules=round(80.0 * (s.t - s.t % 0.001), 6)) for s in samples]


def test_the_cpus_energy_stands_beside_the_cards_and_without_a_card_alone() -> None:
    for faults in ([with_cpu], [with_cpu, without(COUNTER, INSTANT, AVERAGE)]):
        metrics = figures(CARD, *faults).metrics
        assert metrics["energy/cpu_joules"] == pytest.approx(80 * SECONDS, abs=metrics["energy/cpu_joules_error"])
        assert metrics["energy/cpu_joules_error"] < 20
        assert metrics[CPU] == metrics["energy/cpu_joules"] / TOKENS


def test_without_rapl_the_cpus_energy_is_absent_with_the_reason() -> None:
    found = figures(seen=HostFacts(no_cpu_sensor="the kernel does not let this user read it"))
    assert found.absent[CPU] == "the kernel does not let this user read it"
    assert figures().absent[CPU]
    assert figures(events=EVENTS[:-1]).absent[CPU]


FAULTS = st.one_of(
    st.builds(frozen, st.floats(0, 11), st.floats(0.3, 9), st.booleans()),
    st.builds(reset, st.floats(0, 11)),
    st.builds(silent, st.floats(0, 11)),
    st.builds(
        lambda names, since: without(*names, since=since),
        st.sets(st.sampled_from([COUNTER, INSTANT, AVERAGE]), min_size=1),
        st.floats(0, 11),
    ),
)


@given(
    faults=st.lists(FAULTS, max_size=3), stated=st.sampled_from([Stated(), STATED]), idle=st.sampled_from([None, IDLE])
)
def test_whatever_fails_each_figure_is_finite_or_has_a_reason(
    faults: list[Fault], stated: Stated, idle: Idle | None
) -> None:
    card = replace(CARD, power=Square(100, 400, 5.0, 0.5, 0.2))
    found = figures(card, *faults, seen=HostFacts(idle=idle, stated=stated))
    for name in (GROSS, NET, CPU):
        assert (name in found.metrics) != (name in found.absent)
    assert (found.tags["energy_source"] == "none") == (GROSS in found.absent)
    assert all(math.isfinite(value) for value in found.metrics.values())
    assert all(found.absent.values())
    if found.tags["energy_source"] in ("instant_power", "average_power"):
        assert found.tags["energy_source_reason"]
