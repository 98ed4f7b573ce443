"""Figures of a trial that several cards share: tokens and energy of all of them, memory and health of each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Constant, SyntheticCard, silent, step, window_of

from lora_lab.events import Ended, Event, MatmulRate, ModelCounted, PhaseBegan, PhaseMemory, Ran, Ready
from lora_lab.telemetry.attempts import split
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.gpu_processes import worker_pids
from lora_lab.telemetry.host_facts import HostFacts, Idle
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.summary import summarise

START, STEPS, REAL, SECONDS = 2.0, 40, 1000, 8.0
WINDOW = window_of(START, [step(number, SECONDS / STEPS, REAL) for number in range(1, STEPS + 1)])
PIDS = (17, 18)
READY = [Ready(t=0.0, pid=pid, prepared=True, rank=rank) for rank, pid in enumerate(PIDS)]


def together(*cards: Sequence[Sample]) -> list[Sample]:
    """Readings of several cards, as a sampler takes them."""
    return sorted((replace(s, card=card) for card, each in enumerate(cards) for s in each), key=lambda sample: sample.t)


def energy(samples: Sequence[Sample], idle: Idle | None = None) -> Summary:
    return summarise(WINDOW, samples, HostFacts(idle=idle), asked_t=0.0)


@given(watts=st.lists(st.floats(50, 700), min_size=2, max_size=4))
def test_the_energy_is_the_sum_over_the_cards(watts: list[float]) -> None:
    cards = [
        SyntheticCard(power=Constant(each), phase=0.2 * n, read_jitter=0.3, seed=n).samples(START + SECONDS + 1)
        for n, each in enumerate(watts)
    ]
    found = energy(together(*cards)).metrics
    assert found["energy/joules"] == pytest.approx(sum(watts) * SECONDS, abs=found["energy/joules_error"] + 1e-6)
    assert found["energy/joules_per_token"] == pytest.approx(found["energy/joules"] / (STEPS * REAL))
    assert found["energy/mean_power_watts"] == pytest.approx(sum(watts), rel=0.1)


def test_without_the_energy_of_one_card_there_is_none() -> None:
    card = SyntheticCard(power=Constant(300.0)).samples(START + SECONDS + 1)
    found = energy(together(card, silent(START + 1)(card)))
    assert "energy/joules" not in found.metrics
    assert "card 1 of 2" in found.absent["energy/joules_per_token"]


def calm(card: int, change: Callable[[float], dict[str, Any]] = lambda _: {}, **fields: Any) -> list[Sample]:
    """A calm card with its own worker, and what is different on it at each second."""
    usual = Sample(
        t=0.0,
        used_bytes=(card + 1) * GIB,
        processes=((PIDS[card], (card + 1) * GIB),),
        temperature_celsius=60.0,
        sm_mhz=1800.0,
        slowdowns=0,
        power_cap_seconds=0.0,
        thermal_seconds=50.0 * card,
        brake_seconds=0.0,
    )
    return [replace(usual, t=n / 4, **{**fields, **change(n / 4)}) for n in range(int(4 * (START + SECONDS + 1)))]


def judged(*cards: Sequence[Sample]) -> Summary:
    seen = HostFacts(parent_pid=12, card_bytes=24 * GIB)
    return summarise([*READY, *WINDOW], together(*cards), seen, asked_t=0.0)


def test_cards_that_differ_and_keep_steady_are_valid() -> None:
    found = judged(calm(0), calm(1, temperature_celsius=75.0, sm_mhz=1500.0))
    assert found.tags["validity"] == "valid", found.tags
    assert found.metrics["card/foreign_processes"] == 0
    assert found.metrics["card/window_end_celsius"] == 75
    assert found.metrics["card/sm_mhz_median"] == 1500
    assert found.metrics["card/temperature_drift_celsius"] == 0


@pytest.mark.parametrize("hot", [0, 1])
def test_one_card_held_down_by_heat_makes_the_trial_invalid(hot: int) -> None:
    cards = [calm(0), calm(1)]
    cards[hot] = calm(hot, lambda t: {"thermal_seconds": 50.0 * hot + t / 2})
    found = judged(*cards)
    assert found.tags["validity"] == "invalid"
    assert found.metrics["card/thermal_share"] == pytest.approx(0.5, abs=0.01)


def test_a_card_that_was_not_watched_is_not_said_to_be_valid() -> None:
    assert judged(calm(0), calm(1, sm_mhz=None, slowdowns=None)).tags["validity"] == "valid", "it has no such sensor"
    assert judged(calm(0), calm(1)[: int(4 * START)]).tags["validity"] == "unknown"


def test_in_a_container_each_worker_is_known_by_the_card_that_it_came_to() -> None:
    def listed(card: int, pid: int) -> list[Sample]:
        return [Sample(t=t, card=card, processes=((pid, GIB),) if t > 0 else ()) for t in (-1.0, 1.0, 2.0)]

    samples = sorted([*listed(0, 9001), *listed(1, 9002)], key=lambda sample: sample.t)
    assert worker_pids([replace(each, t=-0.5) for each in READY], samples, 12) == {9001, 9002}


@pytest.mark.parametrize("first", [0, 1])
def test_workers_that_are_ready_in_any_order_are_of_one_attempt(first: int) -> None:
    ready = [READY[first], READY[1 - first]]
    began, ended = PhaseBegan(t=0.1, phase="start"), Ended(t=1.0, outcome="finished", reason="")
    assert split([*ready, began, ended]) == [[*ready, began, ended]]
    assert len(split([*ready, began, *ready, began, ended])) == 2


def test_memory_is_that_of_the_fullest_card_and_each_cards_own_is_told() -> None:
    def told(rank: int) -> Event:
        size = (rank + 1) * GIB
        return PhaseMemory(t=9.0, phase="window", peak_allocated_bytes=size, peak_reserved_bytes=2 * size, rank=rank)

    warm_up = replace(told(0), phase="warm_up")
    begun = [PhaseBegan(t=0.5, phase="warm_up"), warm_up, PhaseBegan(t=START, phase="window")]
    events = [*READY, *begun, *WINDOW, told(0), told(1)]
    found = summarise(events, together(calm(0), calm(1)), HostFacts(parent_pid=12, card_bytes=24 * GIB), asked_t=0.0)
    assert found.metrics["vram/peak_allocated_gib"] == 2
    assert found.metrics["vram/peak_process_gib"] == 2
    assert found.tags["vram_by_card.allocated_gib"] == "1.000, 2.000"
    assert found.tags["vram_by_card.reserved_gib"] == "2.000, 4.000"
    assert found.tags["vram_by_card.process_gib"] == "1.000, 2.000"
    assert "vram/other_gib" in found.absent


def test_utilisation_is_of_all_cards() -> None:
    counted = ModelCounted(
        t=0.0,
        frozen=10**6,
        frozen_in_layers=10**6,
        trainable=10**4,
        attention_width=64,
        weight_bytes=1,
        weight_elements=1,
    )
    rate = MatmulRate(t=0.0, dtype="bfloat16", size=64, flops_per_second=1e12)
    steps = [replace(step(n, 0.2), attended=10**5, attended_slots=10**5) for n in range(1, 11)]
    said = [counted, rate, *window_of(START, steps)]

    def mfu(*more: Event) -> float:
        return summarise([*said, *more], [], HostFacts(), asked_t=0.0).metrics["flops/mfu"]

    shared = Ran(t=0.0, facts={"attention_kernel": "flash", "world_size": "2"})
    alone = replace(shared, facts={"attention_kernel": "flash"})
    assert mfu(shared) == pytest.approx(mfu(alone) / 2)


def test_the_worker_that_did_not_finish_says_how_a_trial_ended() -> None:
    lead = Ended(t=2.0, outcome="finished", reason="", peak_host_bytes=GIB)
    other = Ended(t=1.0, outcome="out_of_memory", reason="", asked_bytes=3 * GIB, peak_host_bytes=2 * GIB, rank=1)
    found = summarise([*READY, other], [], HostFacts(), asked_t=0.0)
    assert found.metrics["out_of_memory/asked_gib"] == 3
    found = summarise([*READY, replace(other, outcome="finished"), lead], [], HostFacts(), asked_t=0.0)
    assert found.metrics["host/peak_gib"] == 1
