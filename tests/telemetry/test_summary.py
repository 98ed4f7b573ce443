"""Every headline figure of every trial is there or has a reason, wherever the trial stopped."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.events import (
    Compiled,
    Ended,
    EngineDone,
    Evaluated,
    Event,
    MatmulRate,
    ModelCounted,
    OptimizerMemory,
    PhaseBegan,
    PhaseMemory,
    Profiled,
    Ran,
    Step,
    Warned,
    WindowClosed,
    WindowOpened,
)
from lora_lab.phase import Phase
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.host_facts import HostFacts, Idle, MemoryEstimate
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.summary import summarise

HEADLINES = {
    "throughput/tokens_per_second",
    "throughput/seconds_per_10k_tokens",
    "vram/peak_allocated_gib",
    "vram/peak_reserved_gib",
    "vram/peak_device_gib",
    "energy/joules_per_token",
    "loss/eval_before",
    "loss/eval",
    "loss/train",
}

WARMUP, STEPS = 3, 10
NO_CARD = "no NVIDIA card was used"
LOST = HostFacts(no_sensor="the sensor failed (GPU is lost)")
UNSEEN = HostFacts(no_sensor=NO_CARD)
WATTS = 300.0
SEEN = HostFacts(
    idle=Idle(watts=60.0, error_watts=0.5, source="counter", start=0.0, end=5.0, state="at rest", measured_ms=1),
    used_before_bytes=GIB // 2,
    estimate=MemoryEstimate(
        allocated=2 * GIB, reserved=3 * GIB, card=GIB, low=GIB, enough=GIB, high=GIB, slots=2000, verdict="fits"
    ),
)
ASKED_T = -2.0


def step(number: int) -> Step:
    return Step(
        t=float(number),
        step=number,
        seconds=None if number == 1 else 1.0,
        loss=9.0 if number <= WARMUP else 2.0,
        rows=2,
        slots=2000,
        real=10**6 if number <= WARMUP else 1500,
        trained=10**5 if number <= WARMUP else 600,
        skipped=False,
        attended=1500 * 750,
        attended_slots=2000 * 1000,
    )


COUNTED: list[Event] = [
    Ran(t=0, facts={"gradient_checkpointing": "full", "attention_kernel": "flash"}),
    ModelCounted(
        t=0,
        frozen=10**9,
        frozen_in_layers=9 * 10**8,
        trainable=10**7,
        attention_width=4096,
        weight_bytes=10**9,
        weight_elements=10**9,
    ),
    MatmulRate(t=0, dtype="bfloat16", size=8192, flops_per_second=1e14),
    OptimizerMemory(t=0, total_bytes=GIB, eligible_bytes=GIB, paged_bytes=0, paged_tensors=0, is_paged=False),
    Profiled(t=0, steps=2, slots=4000, kernels=100, busy_seconds=1.5, kernel_seconds=1.6),
    Compiled(t=0, seconds=21.8, shapes=[[2, 1024], [2, 512]], graphs=True, working_bytes=3 * GIB),
    EngineDone(t=0, replays=13, unrecorded=1, compilations=2),
]
"""What a worker tells besides; on a CPU none of it here."""


def story(on_gpu: bool) -> list[Event]:
    """A whole trial, one step a second: on a GPU each loss is one step late."""

    def memory(t: float, phase: Phase, gib: float) -> list[Event]:
        allocated, reserved = round(gib * GIB), round(1.5 * gib * GIB)
        told = PhaseMemory(t=t, phase=phase.value, peak_allocated_bytes=allocated, peak_reserved_bytes=reserved)
        return [told] if on_gpu else []

    def began(t: float, phase: Phase) -> Event:
        return PhaseBegan(t=t, phase=phase.value)

    events: list[Event] = [began(0, Phase.start), *memory(0, Phase.start, 0.1), began(0, Phase.data)]
    events += [Warned(t=0, text="careful"), *memory(0, Phase.data, 0.1), began(0, Phase.model)]
    events += [*memory(0, Phase.model, 9.0), began(0, Phase.evaluation_before)]
    events += [Evaluated(t=0, phase=Phase.evaluation_before.value, loss=3.0, rows=4, tokens=40)]
    events += [*memory(0, Phase.evaluation_before, 8.0), began(0, Phase.warm_up)]
    late: list[Event] = []
    last = WARMUP + STEPS
    for number in range(1, last + 1):
        late.append(step(number))
        if number == last:
            events.append(WindowClosed(t=float(number), after_step=last))
        if on_gpu and number < last:
            events += late[:-1]
            late = late[-1:]
        else:
            events += late
            late = []
        if number == WARMUP:
            events += [*memory(number, Phase.warm_up, 2.0), began(number, Phase.window)]
            events += [WindowOpened(t=float(number), after_step=WARMUP)]
    events += [*memory(last, Phase.window, 1.0), began(last, Phase.evaluation_after), *(COUNTED if on_gpu else [])]
    events += [Evaluated(t=last, phase=Phase.evaluation_after.value, loss=1.5, rows=4, tokens=40)]
    events += [*memory(last, Phase.evaluation_after, 7.0), Ended(t=last, outcome="finished", reason="")]
    return events


def card(until: float = 20.0) -> list[Sample]:
    return [
        Sample(
            t=i / 10,
            energy_joules=WATTS * i / 10,
            instant_watts=WATTS,
            average_watts=WATTS,
            cpu_joules=80.0 * i / 10,
            used_bytes={50: 3, 180: 9}.get(i, 2) * GIB,
            processes=() if i < 5 else ((17, GIB),),
            temperature_celsius=60.0,
            sm_mhz=1800.0,
            slowdowns=0,
        )
        for i in range(int(until * 10))
    ]


def assert_accounted(summary: Summary) -> None:
    """Each headline in exactly one place; a reason for what is missing; nothing made up."""
    assert summary.metrics.keys() & summary.absent.keys() == set()
    assert summary.metrics.keys() | summary.absent.keys() >= HEADLINES
    assert all(summary.absent.values())
    assert all(
        math.isfinite(summary.metrics[name]) and summary.metrics[name] > 0 for name in HEADLINES & set(summary.metrics)
    )


def test_a_whole_trial_on_a_gpu_has_every_figure() -> None:
    summary = summarise(story(on_gpu=True), card(), SEEN, ASKED_T)
    assert_accounted(summary)
    assert summary.absent == {}
    measured = {name: summary.metrics[name] for name in HEADLINES}
    assert measured == pytest.approx(
        {
            "throughput/tokens_per_second": 1500.0,
            "throughput/seconds_per_10k_tokens": 10 / 1.5,
            "vram/peak_allocated_gib": 2.0,  # of the training; the model's loading and evaluations take more here
            "vram/peak_reserved_gib": 3.0,
            "vram/peak_device_gib": 3.0,
            "energy/joules_per_token": WATTS / 1500,
            "loss/eval_before": 3.0,
            "loss/eval": 1.5,
            "loss/train": 2.0,  # of the window, not of the warm-up
        },
        rel=0.02,
    )
    assert summary.metrics["energy/mean_power_watts"] == pytest.approx(WATTS, rel=0.02)
    net = (WATTS - 60.0) / 1500
    assert summary.metrics["energy/net_joules_per_token"] == pytest.approx(net, rel=0.03)
    assert summary.metrics["energy/cpu_joules_per_token"] == pytest.approx(80.0 / 1500, rel=0.03)
    assert {"vram/other_gib", "flops/mfu", "throughput/gpu_busy_share"} <= summary.metrics.keys()
    assert summary.tags["energy_source"] == "counter"
    assert summary.tags["validity"] == "valid"
    careful, waits = summary.warnings
    assert careful == "careful"
    assert "engine=graph" in waits  # its profiled step was busy for less than the window's took


def test_on_a_cpu_what_only_a_card_knows_is_absent() -> None:
    summary = summarise(story(on_gpu=False), [], UNSEEN, ASKED_T)
    assert_accounted(summary)
    reasons = {
        "vram/peak_allocated_gib": "torch's allocator reports on GPUs only",
        "vram/peak_reserved_gib": "torch's allocator reports on GPUs only",
        "vram/peak_device_gib": NO_CARD,
        "vram/peak_process_gib": NO_CARD,
        "energy/joules_per_token": NO_CARD,
        "energy/net_joules_per_token": NO_CARD,
    }
    assert {name: summary.absent[name] for name in reasons} == reasons


@given(on_gpu=st.booleans(), stopped=st.integers(0, 60), sampled=st.floats(0, 20), fault=st.booleans())
def test_wherever_a_trial_stops_its_figures_are_whole_or_absent(
    on_gpu: bool, stopped: int, sampled: float, fault: bool
) -> None:
    whole = story(on_gpu)
    events = whole[:stopped]
    samples = card(sampled) if on_gpu else []
    no_sensor = NO_CARD if not on_gpu else "the sensor failed (GPU is lost)" if fault or not samples else ""
    summary = summarise(events, samples, HostFacts(no_sensor=no_sensor), ASKED_T)
    assert_accounted(summary)

    complete = all(event in events for event in whole if isinstance(event, Step | WindowClosed))
    rate = "throughput/tokens_per_second"
    assert (rate in summary.metrics) == complete
    assert summary.metrics.get(rate, 1500.0) == pytest.approx(1500.0)
    # a sample at or after the window's end must have been taken, or there is no energy
    assert ("energy/joules_per_token" in summary.metrics) == (complete and len(samples) > 10 * (WARMUP + STEPS))
    assert (summary.tags["energy_source"] == "none") == ("energy/joules_per_token" in summary.absent)
    if not on_gpu:
        assert summary.absent["vram/peak_device_gib"] == NO_CARD


def test_a_sensor_that_failed_leaves_no_peak_of_half_a_trial() -> None:
    summary = summarise(story(on_gpu=True), card(4.0), LOST, ASKED_T)
    assert summary.absent["vram/peak_device_gib"] == "the sensor failed (GPU is lost)"
    assert summary.absent["energy/joules_per_token"] == "the sensor failed (GPU is lost)"
    assert summary.metrics["vram/peak_allocated_gib"] == 2.0, "torch's own figure needs no sensor"


def test_a_sensor_that_fails_after_the_training_has_seen_all_of_it() -> None:
    summary = summarise(story(on_gpu=True), card(15.0), LOST, ASKED_T)
    assert summary.metrics["vram/peak_device_gib"] == 3.0
    assert summary.metrics["energy/joules_per_token"] == pytest.approx(WATTS / 1500, rel=0.02)


def test_reasons_are_the_true_ones_when_a_trial_on_a_gpu_stops_before_training() -> None:
    events = story(on_gpu=True)[:8]
    for no_sensor in ("", "the sensor failed (GPU is lost)"):
        summary = summarise(events, card(), HostFacts(no_sensor=no_sensor), ASKED_T)
        assert summary.absent["vram/peak_allocated_gib"] == "no training step was reached"
        assert summary.absent["energy/joules_per_token"] == (no_sensor or "the measured window was not completed")


def test_a_card_without_power_sensors_still_shows_its_memory() -> None:
    silent = [replace(sample, energy_joules=None, instant_watts=None, average_watts=None) for sample in card()]
    summary = summarise(story(on_gpu=True), silent, SEEN, ASKED_T)
    assert_accounted(summary)
    assert summary.metrics["vram/peak_device_gib"] == 3.0
    assert set(summary.absent) == {"energy/joules_per_token", "energy/net_joules_per_token"}


def test_a_card_without_a_counter_is_measured_by_its_power_and_says_so() -> None:
    summary = summarise(story(on_gpu=True), [replace(sample, energy_joules=None) for sample in card()], SEEN, ASKED_T)
    assert summary.tags["energy_source"] == "instant_power"
    assert summary.metrics["energy/joules_per_token"] == pytest.approx(WATTS / 1500)


def with_steps(**changes: float) -> list[Event]:
    return [replace(e, **changes) if isinstance(e, Step) else e for e in story(on_gpu=True)]  # type: ignore[arg-type]


def test_mostly_padding_and_overflows_are_warned_of() -> None:
    padded = summarise(with_steps(slots=6000), card(), SEEN, ASKED_T)
    assert any("75% of the token slots were padding" in warning for warning in padded.warnings)
    skipped = summarise(with_steps(skipped=True), card(), SEEN, ASKED_T)
    assert skipped.metrics["window/steps_skipped"] == STEPS, "those of the warm-up are not measured"


def test_the_training_loss_weighs_tokens_not_steps() -> None:
    events = story(on_gpu=True)
    at = events.index(step(WARMUP + 1))
    events[at] = replace(step(WARMUP + 1), loss=5.0, trained=6000)
    expected = (5.0 * 6000 + 2.0 * 600 * (STEPS - 1)) / (6000 + 600 * (STEPS - 1))
    assert summarise(events, card(), SEEN, ASKED_T).metrics["loss/train"] == pytest.approx(expected)


OOM = Ended(t=9.0, outcome="out_of_memory", reason="full", asked_bytes=3 * GIB, peak_host_bytes=5 * GIB)
MANIFEST, ALLOCATED, DEVICE = (f"out_of_memory/{name}_gib" for name in ("asked", "peak_allocated", "peak_device"))


@given(on_gpu=st.booleans(), stopped=st.integers(0, 60), sampled=st.floats(0, 20), asked=st.booleans())
def test_out_of_memory_says_what_was_asked_for_and_reached_or_why_not(
    on_gpu: bool, stopped: int, sampled: float, asked: bool
) -> None:
    said = [event for event in story(on_gpu)[:stopped] if not isinstance(event, Ended)]
    ended = OOM if asked else replace(OOM, asked_bytes=None)
    samples = card(sampled) if on_gpu else []
    summary = summarise([*said, ended], samples, SEEN if on_gpu else UNSEEN, ASKED_T)
    assert_accounted(summary)
    assert summary.metrics["host/peak_gib"] == 5.0
    assert summary.metrics.get(MANIFEST, "absent") == (3.0 if asked else "absent")
    told = [event.peak_allocated_bytes / GIB for event in said if isinstance(event, PhaseMemory)]
    assert summary.metrics.get(ALLOCATED) == max(told, default=None), "of the whole trial: loading counts here"
    assert summary.metrics.get(DEVICE) == max((s.used_bytes / GIB for s in samples if s.used_bytes), default=None)
    for name in {MANIFEST, ALLOCATED, DEVICE} - set(summary.metrics):
        assert summary.absent[name]


@pytest.mark.parametrize("outcome", ["finished", "diverged", "failed"])
def test_only_out_of_memory_has_figures_of_it(outcome: str) -> None:
    summary = summarise([*story(on_gpu=True)[:-1], replace(OOM, outcome=outcome)], card(), SEEN, ASKED_T)
    assert not [name for name in summary.metrics.keys() | summary.absent.keys() if name.startswith("out_of_memory/")]


def test_the_times_of_the_phases_are_among_the_figures() -> None:
    metrics = summarise(story(on_gpu=True), card(), SEEN, ASKED_T).metrics
    assert metrics["time/window_seconds"] == STEPS
    assert metrics["time/asked_to_first_step_seconds"] == -ASKED_T
