"""Where a trial's time went, from what its worker said."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.events import Ended, Event, PhaseBegan, Ready
from lora_lab.phase import Phase
from lora_lab.telemetry.durations import durations

FIRST_STEP, OVERHEAD = "time/asked_to_first_step_seconds", "overhead/before_first_step_seconds"
WORK = {"matmul_rate", "conversion", "model", "screening", "evaluation_before", "compilation"}

SECONDS = st.floats(0, 1e4)
TAKEN = st.lists(SECONDS, min_size=len(Phase), max_size=len(Phase))
ASKED_T = st.floats(-1e5, 1e5)


def name(phase: Phase) -> str:
    return f"time/{phase.value}_seconds"


def story(asked_t: float, before: float, taken: list[float], phases: list[Phase]) -> list[Event]:
    """Manifest for; `before` seconds later the first phase; each takes its time; then the last word."""
    begins = list(itertools.accumulate(taken, initial=asked_t + before))
    events: list[Event] = [Ready(t=begins[0], pid=1, prepared=True)]
    events += [PhaseBegan(t=t, phase=phase.value) for phase, t in zip(phases, begins, strict=False)]
    return [*events, Ended(t=begins[len(phases)], outcome="finished", reason="")]


@given(asked_t=ASKED_T, before=SECONDS, taken=TAKEN)
def test_each_phase_takes_until_the_next_one_and_the_last_until_the_end(
    asked_t: float, before: float, taken: list[float]
) -> None:
    found = durations(story(asked_t, before, taken, list(Phase)), asked_t)
    assert set(found) == {name(phase) for phase in Phase} | {FIRST_STEP, OVERHEAD}
    for phase, seconds in zip(Phase, taken, strict=True):
        assert found[name(phase)] == pytest.approx(seconds, abs=1e-6)


@given(asked_t=ASKED_T, before=SECONDS, taken=TAKEN, left_out=st.sets(st.sampled_from(sorted(WORK))))
def test_what_is_no_work_of_the_trial_before_its_first_step_is_overhead(
    asked_t: float, before: float, taken: list[float], left_out: set[str]
) -> None:
    phases = [phase for phase in Phase if phase.value not in left_out]
    seconds = dict(zip(phases, taken, strict=False))
    found = durations(story(asked_t, before, taken, phases), asked_t)
    expected = before + seconds[Phase.start] + seconds[Phase.data]
    assert found[OVERHEAD] == pytest.approx(expected, abs=1e-5)
    work = sum(took for phase, took in seconds.items() if phase.value in WORK)
    assert found[FIRST_STEP] == pytest.approx(expected + work, abs=1e-5)


@given(asked_t=ASKED_T, before=SECONDS, taken=TAKEN, stopped=st.integers(0, len(Phase)))
def test_a_phase_that_was_cut_off_has_no_time(asked_t: float, before: float, taken: list[float], stopped: int) -> None:
    """The worker was killed after `stopped` phases had begun: nobody knows when the last one would have been over."""
    events = story(asked_t, before, taken, list(Phase))[: 1 + stopped]
    found = durations(events, asked_t)
    begun = list(Phase)[:stopped]
    trained = {FIRST_STEP, OVERHEAD} if Phase.warm_up in begun else set()
    assert set(found) == {name(phase) for phase in begun[:-1]} | trained


def test_a_trial_that_ended_itself_early_has_the_time_of_the_phase_it_ended_in() -> None:
    events = [
        PhaseBegan(t=10.0, phase="start"),
        PhaseBegan(t=11.0, phase="model"),
        Ended(t=15.0, outcome="out_of_memory", reason="full"),
    ]
    assert durations(events, 9.0) == {"time/start_seconds": 1.0, "time/model_seconds": 4.0}


def test_a_worker_that_never_spoke_took_no_time_that_is_known() -> None:
    assert durations([], 5.0) == {}
    assert durations([Ended(t=6.0, outcome="failed", reason="x")], 5.0) == {}
