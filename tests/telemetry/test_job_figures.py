"""Figures of a whole training: steady ones over all its stretches, and those from its first step to its end."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import ROUNDING, Constant, SyntheticCard, squares, step, synthetic_cards
from synthetic_job import SyntheticJob

from lora_lab.events import Event, PhaseBegan, WindowClosed
from lora_lab.job_events import Resumed
from lora_lab.phase import Phase
from lora_lab.telemetry.attempts import counting, split
from lora_lab.telemetry.host_facts import HostFacts, Idle, Stated
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.summary import summarise
from lora_lab.telemetry.window import find_window, steady

START = 10.0
IDLE = Idle(watts=60.0, error_watts=0.5, source="counter", start=0.0, end=5.0, state="at rest", measured_ms=1)


def unbroken() -> SyntheticJob:
    """Thirty steps in three stretches."""
    job = SyntheticJob().start(steps=30)
    job.stretch(0, 10).evaluate(10, 3.0).checkpoint(10).stretch(10, 20).evaluate(20, 2.0)
    return job.stretch(20, 30).evaluate(30, 2.5).checkpoint(30).end()


def killed_and_resumed() -> SyntheticJob:
    """The same, killed at step 25 behind an evaluation; the checkpoint is at step 10."""
    job = SyntheticJob().start(steps=30)
    job.stretch(0, 10).evaluate(10, 3.0).checkpoint(10).stretch(10, 20, loss=9.0).evaluate(20, 1.0)
    job.stretch(20, 25, closed=False, loss=9.0)
    job.t += 3600.0
    job.stretches.pop()
    job.start(steps=30, resumed=10, pid=18).stretch(10, 20).evaluate(20, 2.0)
    return job.stretch(20, 30).evaluate(30, 2.5).checkpoint(30).end()


def figures(job: SyntheticJob, samples: list[Sample] | None = None, **stated: float) -> dict[str, float]:
    seen = HostFacts(idle=IDLE, stated=Stated(**stated))
    return summarise(job.events, samples or [], seen, asked_t=START - 10.0).metrics


def test_steady_figures_leave_out_what_lies_between_the_stretches() -> None:
    metrics = figures(unbroken())
    assert metrics["throughput/tokens_per_second"] == 1000.0
    assert (metrics["window/seconds"], metrics["window/steps"]) == (30.0, 30.0)
    assert metrics["time/window_seconds"] == 30.0
    assert metrics["time/evaluation_seconds"] == 21.0


@pytest.mark.parametrize("cut", range(100))
def test_a_job_that_is_cut_off_keeps_the_figures_of_its_closed_stretches(cut: int) -> None:
    job = unbroken()
    job.events = job.events[:cut]
    window = find_window(job.events)
    closed = [event for event in job.events if type(event).__name__ == "WindowClosed"]
    assert len(window.stretches if window else ()) == len(closed)
    metrics = figures(job)
    assert metrics.get("throughput/tokens_per_second", 1000.0) == 1000.0
    assert ("throughput/tokens_per_second" in metrics) == bool(closed)


def test_a_resumed_job_has_the_steady_figures_steps_and_tokens_of_an_unbroken_one() -> None:
    whole, resumed = figures(unbroken()), figures(killed_and_resumed())
    steady_ = [name for name in whole if name.startswith(("throughput/", "window/", "tokens/", "loss/"))]
    of_job = ["steps", "steps_planned", "epochs", "tokens", "trained_tokens", "evaluations", "checkpoints"]
    of_job += ["best_heldout_loss", "best_step"]
    names = [*steady_, *(f"job/{name}" for name in of_job)]
    assert {name: resumed[name] for name in names} == pytest.approx({name: whole[name] for name in names})
    assert (whole["job/steps"], whole["job/epochs"], whole["job/best_step"]) == (30.0, 2.0, 20.0)
    assert (resumed["job/attempts"], resumed["job/steps_taken_again"]) == (2.0, 15.0)


def test_the_hours_of_a_job_are_those_of_its_attempts_and_not_between_them() -> None:
    whole, resumed = figures(unbroken()), figures(killed_and_resumed())
    assert whole["job/hours"] * 3600 == pytest.approx(30 + 3 * 7 + 2 * 3 + 2)
    first = 10 + 7 + 3 + 10 + 7 + 5
    assert resumed["job/hours"] * 3600 == pytest.approx(first + 20 + 2 * 7 + 3 + 2)
    assert resumed["job/evaluation_seconds"] == 28.0, "that of the first attempt was paid for too"


def killed_and_resumed_soon() -> SyntheticJob:
    job = SyntheticJob().start(steps=30)
    job.stretch(0, 10).evaluate(10, 3.0).checkpoint(10).stretch(10, 12, closed=False)
    job.t += 20.0
    job.start(steps=30, resumed=10, pid=18).stretch(10, 20).evaluate(20, 2.0).stretch(20, 30)
    return job.end()


@given(card=synthetic_cards(squares(0.004, 20)))
def test_the_energies_of_all_stretches_and_of_the_whole_job_hold_the_truth_within_their_bounds(
    card: SyntheticCard,
) -> None:
    job = killed_and_resumed_soon()
    metrics = figures(job, card.samples(job.t + 2), price_per_kwh=0.5)
    true = sum(card.drawn(start, end) for start, end in job.stretches)
    slack = len(job.stretches) * ROUNDING
    assert abs(metrics["energy/joules"] - true) <= metrics["energy/joules_error"] + slack
    assert metrics["energy/joules_per_token"] == pytest.approx(metrics["energy/joules"] / 30_000)
    assert metrics["energy/net_joules"] == pytest.approx(metrics["energy/joules"] - 60 * 30)
    # two edges a stretch, each known to a tick and a reading on either side
    most = card.power.highest * (card.tick * 1.9 + 0.1) * 2 * 2
    assert metrics["energy/joules_error"] <= len(job.stretches) * most + slack

    first, second = split(job.events)
    spans = [(START + 5.0, max(event.t for event in first)), (second[0].t + 5.0, job.t)]
    true = sum(card.drawn(start, end) for start, end in spans)
    assert abs(metrics["job/kwh"] * 3.6e6 - true) <= metrics["job/kwh_error"] * 3.6e6 + slack
    assert metrics["job/kwh_error"] * 3.6e6 <= 2 * (most + 1.1 * card.power.highest)
    assert metrics["job/joules_per_token"] == pytest.approx(metrics["job/kwh"] * 3.6e6 / 30_000)
    assert metrics["job/cost"] == pytest.approx(metrics["job/kwh"] * 0.5)


@pytest.mark.parametrize("last", [0.0, 0.3, 5.0])
def test_what_a_killed_parent_did_not_read_is_in_the_bound(last: float) -> None:
    """Readings end some time before the last event."""
    job = SyntheticJob().start(steps=30).stretch(0, 10).evaluate(10, 3.0).stretch(10, 15, closed=False)
    card = SyntheticCard(power=Constant(300.0), phase=0.3)
    samples = [sample for sample in card.samples(job.t + 2) if sample.t <= job.t - last]
    metrics = figures(job, samples)
    true = 300.0 * (job.t - START - 5.0)
    error = metrics["job/kwh_error"] * 3.6e6
    assert abs(metrics["job/kwh"] * 3.6e6 - true) <= error <= 300.0 * (last + 1.0) + 150.0


def test_a_sensor_that_failed_hours_before_the_end_leaves_no_energy_of_the_job_but_that_of_the_stretches_before() -> (
    None
):
    job = unbroken()
    samples = [sample for sample in SyntheticCard(power=Constant(300.0)).samples(job.t) if sample.t < START + 40.0]
    summary = summarise(job.events, samples, HostFacts(no_sensor="the sensor failed (lost)"), asked_t=START - 10.0)
    assert summary.absent["job/kwh"] == "the sensor failed (lost)"
    assert summary.metrics["energy/joules"] == pytest.approx(300.0 * 20, rel=0.05)
    assert summary.metrics["energy/joules_per_token"] == pytest.approx(0.3, rel=0.05)
    assert summary.metrics["energy/stretches_left_out"] == 1.0
    assert any("1 of 3 stretches" in warning for warning in summary.warnings)


def test_stretches_shorter_than_a_tick_have_a_bound_as_wide_as_they_are_unknown() -> None:
    """Each is 50 ms long, with a counter that moves every 100 ms."""
    card = SyntheticCard(power=Constant(300.0), phase=0.3)
    job = SyntheticJob().start(steps=400)
    for number in range(60):
        job.stretch(number, number, closed=False)
        job.say(replace(step(number + 1, 0.05), t=job.t))
        job.t += 0.05
        job.say(WindowClosed(t=job.t, after_step=number + 1))
        job.t += 0.43
    metrics = figures(job, card.samples(job.t + 2))
    true, error = 60 * 0.05 * 300.0, metrics["energy/joules_error"]
    assert abs(metrics["energy/joules"] - true) <= error
    assert 60 * 0.1 * 300.0 <= error <= 60 * 0.4 * 300.0, "a tick at each edge of each"


def test_the_workers_of_all_attempts_are_not_foreign() -> None:
    job = killed_and_resumed()
    samples = [
        *(Sample(t=t, processes=((17, 5),), used_bytes=9) for t in (START + 1, START + 30)),
        *(Sample(t=job.t - t, processes=((18, 7),), used_bytes=9) for t in (30.0, 20.0)),
    ]
    metrics = figures(job, samples)
    assert metrics["card/foreign_processes"] == 0.0
    assert metrics["vram/peak_process_gib"] == 7 / 2**30


@dataclass(frozen=True)
class Taken:
    """A job as kills and spikes cut it up: each attempt goes on from a checkpoint before it."""

    events: list[Event]
    last: int


@st.composite
def broken_jobs(draw: st.DrawFn) -> Taken:
    job, done = SyntheticJob(), 0
    for attempt in range(draw(st.integers(1, 4))):
        back = draw(st.integers(0, done))
        if attempt and draw(st.booleans()):  # a spike, in the same worker
            job.say(Resumed(t=job.t, step=back, folder="")).say(PhaseBegan(t=job.t, phase=Phase.warm_up.value))
        else:
            job.start(resumed=back if attempt and (back or draw(st.booleans())) else None)
        done = back
        for _ in range(draw(st.integers(0, 3))):
            more = draw(st.integers(1, 4))
            job.stretch(done, done + more, closed=draw(st.booleans()), loss=float(attempt))
            done += more
            if draw(st.booleans()):
                job.evaluate(done, 1.0)
    return Taken(job.events, done)


@given(broken_jobs())
def test_each_step_counts_once_however_a_job_was_cut_up(taken: Taken) -> None:
    kept = [event.step for event in counting(taken.events) if type(event).__name__ == "Step"]
    assert kept == [*range(1, taken.last + 1)]
    window = find_window(taken.events)
    measured = [each.step for each in window.steps] if window else []
    assert len(set(measured)) == len(measured)
    if window:
        assert window.seconds == pytest.approx(len(measured)), "a second each"
        assert steady(window) == window


def test_the_slow_first_steps_of_every_attempt_are_left_out() -> None:
    job = killed_and_resumed()
    slow = [replace(e, seconds=30.0) if getattr(e, "step", 0) == 11 and hasattr(e, "slots") else e for e in job.events]
    window = find_window(slow)
    assert window is not None
    kept = [each.step for each in steady(window).steps]
    assert kept == [*range(1, 11), *range(12, 31)]
