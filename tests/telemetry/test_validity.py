"""Whether a run's figures may be compared; a run that may not is kept and marked."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import step, window_of

from lora_lab.events import Event, PhaseBegan, PhaseMemory, Ready
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.summary import summarise

WORKER, PARENT = 17, 12
START, SECONDS = 10.0, 20.0
SEEN = HostFacts(parent_pid=PARENT, card_bytes=24 * GIB)
POWER_CAP, THERMAL_SOFT, THERMAL_HARD, BRAKE = 0x4, 0x20, 0x40, 0x80


def events(retries: int = 0, reserved: int = GIB) -> list[Event]:
    inside = window_of(START, [step(number, 1.0) for number in range(1, 21)])
    memory = PhaseMemory(
        t=START + SECONDS, phase="window", peak_allocated_bytes=GIB, peak_reserved_bytes=reserved, retries=retries
    )
    return [Ready(t=0.0, pid=WORKER, prepared=True), PhaseBegan(t=START, phase="window"), *inside, memory]


def card(change: Callable[[float], dict[str, Any]] = lambda _: {}, **fields: Any) -> list[Sample]:
    """A calm card, read four times a second, and what is different on it at each share of the window."""
    calm = Sample(
        t=0.0,
        used_bytes=2 * GIB,
        processes=((WORKER, GIB),),
        temperature_celsius=70.0,
        sm_mhz=1800.0,
        memory_mhz=9000.0,
        slowdowns=0,
        power_cap_seconds=100.0,
        thermal_seconds=50.0,
        brake_seconds=7.0,
    )
    times = [number / 4 for number in range(int(4 * (START + SECONDS + 5)))]
    calm = replace(calm, **fields)
    return [replace(calm, t=t, **change((t - START) / SECONDS)) for t in times]


def judged(samples: Sequence[Sample], said: Sequence[Event] | None = None, seen: HostFacts = SEEN) -> Summary:
    return summarise(events() if said is None else said, samples, seen, asked_t=0.0)


def verdict(found: Summary) -> tuple[str, str]:
    return found.tags["validity"], found.tags.get("validity_reasons", "")


def test_a_card_left_alone_cool_and_at_one_speed_is_valid() -> None:
    found = judged(card())
    assert verdict(found) == ("valid", "")
    told = {name: value for name, value in found.metrics.items() if name.startswith("card/")}
    assert told == {
        "card/foreign_processes": 0.0,
        "card/thermal_share": 0.0,
        "card/brake_share": 0.0,
        "card/power_cap_share": 0.0,
        "card/window_end_celsius": 70.0,
        "card/temperature_drift_celsius": 0.0,
        "card/sm_mhz_median": 1800.0,
        "card/sm_clock_spread": 0.0,
        "card/memory_mhz_median": 9000.0,
    }


def growing(name: str, share: float, from_value: float) -> Callable[[float], dict[str, Any]]:
    return lambda at: {name: from_value + share * SECONDS * at}


CAUSES = {
    "heat": (card(growing("thermal_seconds", 0.05, 50.0)), events(), "invalid", "heat held the clocks down for 5%"),
    "heat, by readings": (
        card(lambda at: {"slowdowns": THERMAL_SOFT if at > 0.9 else 0}, thermal_seconds=None),
        events(),
        "invalid",
        "heat",
    ),
    "hard heat, by readings": (
        card(lambda at: {"slowdowns": THERMAL_HARD if at > 0.9 else 0}, thermal_seconds=None),
        events(),
        "invalid",
        "heat",
    ),
    "brake": (card(growing("brake_seconds", 0.05, 7.0)), events(), "invalid", "power brake signal"),
    "brake, by readings": (card(lambda _: {"slowdowns": BRAKE}, brake_seconds=None), events(), "invalid", "brake"),
    "stranger": (
        card(lambda at: {"processes": ((WORKER, GIB), (4242, None)) if at > 0.5 else ((WORKER, GIB),)}),
        events(),
        "invalid",
        "4242",
    ),
    "spilled": (card(), events(reserved=30 * GIB), "invalid", "main memory"),
    "retries": (card(), events(retries=3), "doubtful", "again 3 times"),
    "warming": (card(lambda at: {"temperature_celsius": 60.0 + 15 * at}), events(), "doubtful", "+15 degrees"),
    "cooling": (card(lambda at: {"temperature_celsius": 60.0 - 15 * at}), events(), "doubtful", "-15 degrees"),
    "clocks": (card(lambda at: {"sm_mhz": 1800.0 - 400 * at}), events(), "doubtful", "clock varied"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_marks_the_run_in_words_and_keeps_its_figures(cause: str) -> None:
    samples, said, expected, words = CAUSES[cause]
    found = judged(samples, said)
    assert verdict(found)[0] == expected
    assert words in verdict(found)[1]
    sound = judged(card())
    apart = ("card/", "vram/")
    assert {name: value for name, value in found.metrics.items() if not name.startswith(apart)} == {
        name: value for name, value in sound.metrics.items() if not name.startswith(apart)
    }


def test_the_worse_of_two_verdicts_is_told_with_both_reasons() -> None:
    found = judged(card(growing("thermal_seconds", 0.3, 0.0)), events(retries=1))
    assert verdict(found)[0] == "invalid"
    assert "heat" in verdict(found)[1]
    assert "allocator" in verdict(found)[1]


@given(share=st.floats(0, 1), name=st.sampled_from(["thermal", "brake", "power_cap"]), begin=st.floats(0, 1e6))
def test_the_share_of_throttled_time_is_what_the_cards_counter_grew_by(share: float, name: str, begin: float) -> None:
    """Readings see a part of it only: those between two of them are not missed by a counter."""
    found = judged(card(growing(f"{name}_seconds", share, begin), slowdowns=0))
    assert found.metrics[f"card/{name}_share"] == pytest.approx(share, abs=1e-6)


@given(throttled=st.floats(0.02, 0.98))
def test_without_such_counters_it_is_the_share_of_readings_that_say_so(throttled: float) -> None:
    reasons = {"thermal_share": THERMAL_HARD, "brake_share": BRAKE, "power_cap_share": POWER_CAP}
    gone = dict.fromkeys(("power_cap_seconds", "thermal_seconds", "brake_seconds"))
    for name, bit in reasons.items():
        samples = card(lambda at, bit=bit: {"slowdowns": bit if 0 <= at < throttled else 0}, **gone)  # type: ignore[misc]
        assert judged(samples).metrics[f"card/{name}"] == pytest.approx(throttled, abs=0.02)


def test_a_counter_of_throttling_that_runs_backwards_is_not_believed() -> None:
    samples = card(lambda at: {"thermal_seconds": 50.0 if at < 0.5 else 0.0, "slowdowns": THERMAL_HARD})
    assert judged(samples).metrics["card/thermal_share"] == 1.0


def test_a_card_at_its_power_limit_says_for_how_long_and_is_valid() -> None:
    """Under it the clocks follow the load: how a card in normal use works."""
    found = judged(card(lambda at: {"sm_mhz": 1800.0 - 500 * at, "power_cap_seconds": 0.8 * SECONDS * at}))
    assert found.metrics["card/power_cap_share"] == pytest.approx(0.8)
    assert found.metrics["card/sm_clock_spread"] > 0.2
    assert verdict(found)[0] == "valid"


def test_what_happens_before_and_after_the_window_is_no_fault_of_its_figures() -> None:
    outside = {
        "temperature_celsius": 20.0,
        "sm_mhz": 300.0,
        "slowdowns": THERMAL_HARD,
        "thermal_seconds": 0.0,
        "brake_seconds": 0.0,
    }
    assert verdict(judged(card(lambda at: {} if 0 <= at <= 1 else outside)))[0] == "valid"


def test_what_nobody_could_look_at_is_unknown_and_not_valid() -> None:
    no_card = judged([], seen=HostFacts(no_sensor="no NVIDIA card was used"))
    assert verdict(no_card) == ("unknown", "no NVIDIA card was used")
    assert "no window" in verdict(judged(card(), events()[:-3]))[1]
    blind = judged(card(sm_mhz=None, slowdowns=None))
    assert verdict(blind)[0] == "unknown"
    assert "not read within the window" in verdict(blind)[1]
    assert "card/foreign_processes" not in judged(card(processes=None)).metrics


def test_a_driver_that_lists_nobody_has_not_seen_that_nobody_was_there() -> None:
    """As on WSL2 and in some containers: the worker itself was on the card."""
    found = judged(card(processes=()))
    assert "card/foreign_processes" not in found.metrics
    assert found.absent["card/foreign_processes"]


def test_a_run_without_a_window_can_be_invalid() -> None:
    found = judged(card(processes=((WORKER, 1), (4242, 1))), events()[:-3])
    assert verdict(found)[0] == "invalid"


def test_clocks_without_a_reading_of_their_reasons_are_looked_at_too() -> None:
    drift = card(lambda at: {"sm_mhz": 1800.0 - 400 * at}, slowdowns=None, thermal_seconds=None, brake_seconds=None)
    found = judged(drift)
    assert "clock varied" in verdict(found)[1]
    inside = [sample.sm_mhz for sample in drift if START <= sample.t <= START + SECONDS and sample.sm_mhz is not None]
    spread = (max(inside) - min(inside)) / found.metrics["card/sm_mhz_median"]
    assert 0.15 < spread < 0.3
    assert found.metrics["card/sm_clock_spread"] == pytest.approx(spread)
