"""Device memory of each phase, and what neither the allocator nor managed memory accounts for."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.events import Ended, Event, OptimizerMemory, PhaseBegan, PhaseMemory, Ready
from lora_lab.phase import FIRST_STEP, Phase
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.memory import add_memory
from lora_lab.telemetry.sampler import Sample

WORKER = 17
PARTS = {
    "load": ["model"],
    "first_step": [FIRST_STEP],
    "steady": ["window"],
    "evaluation": ["evaluation_before", "evaluation_after"],
}
PHASES = [
    Phase.start,
    Phase.model,
    Phase.evaluation_before,
    Phase.warm_up,
    Phase.window,
    Phase.profile,
    Phase.evaluation_after,
]
SEEN = HostFacts(used_before_bytes=GIB // 2, card_bytes=24 * GIB, parent_pid=12)
OPTIMIZER = OptimizerMemory(t=0.0, total_bytes=GIB, eligible_bytes=GIB, paged_bytes=0, paged_tensors=0, is_paged=False)


def story(peaks: dict[str, tuple[float, float]], *more: Event) -> list[Event]:
    """Each phase takes ten seconds; the first step the warm-up's first five. Peaks: allocated, reserved in GiB."""
    events: list[Event] = [Ready(t=0.0, pid=WORKER, prepared=True), *more]
    for number, phase in enumerate(PHASES):
        t = 10.0 * number
        events.append(PhaseBegan(t=t, phase=phase.value))
        if phase is Phase.warm_up and FIRST_STEP in peaks:
            events.append(told(t + 5, FIRST_STEP, peaks))
        if phase.value in peaks:
            events.append(told(t + 10, phase.value, peaks))
    return [*events, Ended(t=10.0 * len(PHASES), outcome="finished", reason="")]


def told(t: float, phase: str, peaks: dict[str, tuple[float, float]]) -> PhaseMemory:
    allocated, reserved = (round(gib * GIB) for gib in peaks[phase])
    return PhaseMemory(t=t, phase=phase, peak_allocated_bytes=allocated, peak_reserved_bytes=reserved)


def reading(t: float, used: float, worker: float | None = None) -> Sample:
    processes = () if worker is None else ((WORKER, round(worker * GIB)), (99, GIB))
    return Sample(t=t, used_bytes=round(used * GIB), processes=processes)


def memory(events: Sequence[Event], samples: Sequence[Sample], seen: HostFacts = SEEN) -> Summary:
    summary = Summary()
    add_memory(summary, events, samples, seen)
    return summary


SPANS = {phase.value: (10.0 * number, 10.0 * number + 10) for number, phase in enumerate(PHASES)} | {
    FIRST_STEP: (30.0, 35.0)
}
USED = st.floats(0.5, 24)


@given(
    peaks=st.dictionaries(st.sampled_from([*SPANS]), st.tuples(USED, USED)),
    samples=st.lists(st.builds(reading, st.floats(0, 70), USED, st.none() | USED), max_size=40),
)
def test_each_phases_peaks_are_the_most_that_was_seen_within_it_and_absent_where_nobody_looked(
    peaks: dict[str, tuple[float, float]], samples: list[Sample]
) -> None:
    metrics = memory(story(peaks), sorted(samples, key=lambda sample: sample.t)).metrics
    for part, phases in PARTS.items():
        inside = [s for s in samples if any(a <= s.t <= b for a, b in (span(phase, peaks) for phase in phases))]
        of_worker = [dict(s.processes or ()).get(WORKER) for s in inside]
        expected = {
            "allocated": max((peaks[phase][0] for phase in phases if phase in peaks), default=None),
            "reserved": max((peaks[phase][1] for phase in phases if phase in peaks), default=None),
            "device": max(((s.used_bytes or 0) / GIB for s in inside), default=None),
            "process": max((b / GIB for b in of_worker if b is not None), default=None),
        }
        for kind, gib in expected.items():
            assert metrics.get(f"vram/{part}_{kind}_gib") == (None if gib is None else pytest.approx(gib, abs=1e-6))


def span(phase: str, peaks: dict[str, tuple[float, float]]) -> tuple[float, float]:
    return SPANS[phase] if phase != FIRST_STEP or FIRST_STEP in peaks else (1.0, 0.0)


TRAINING = {"warm_up": (3.0, 4.0), "window": (2.0, 3.0), FIRST_STEP: (5.0, 6.0), "model": (9.0, 9.0)}


def test_the_peaks_of_training_hold_the_first_step_and_neither_loading_nor_profiling() -> None:
    samples = [reading(12, 20, 19), reading(31, 7, 6), reading(45, 5, 4), reading(55, 15, 14)]
    metrics = memory(story(TRAINING), samples).metrics
    assert metrics["vram/peak_allocated_gib"] == 5.0
    assert metrics["vram/peak_reserved_gib"] == 6.0
    assert metrics["vram/peak_device_gib"] == 7.0
    assert metrics["vram/peak_process_gib"] == 6.0


def test_a_driver_that_does_not_say_whose_memory_it_is_leaves_the_process_absent_with_a_reason() -> None:
    """As on WSL2 and in some containers."""
    for processes in ((), ((WORKER, None),)):
        found = memory(story(TRAINING), [replace(reading(45, 5), processes=processes)])
        assert found.metrics["vram/peak_device_gib"] == 5.0
        assert "driver does not list" in found.absent["vram/peak_process_gib"]


@given(
    used=st.floats(4, 20), before=st.floats(0, 1), reserved=st.floats(1, 3), paged=st.floats(0, 1), other=st.booleans()
)
def test_used_memory_is_what_was_there_before_and_the_allocators_and_managed_and_the_rest(
    used: float, before: float, reserved: float, paged: float, other: bool
) -> None:
    peaks = TRAINING | {"window": (0.5, reserved)}
    state = replace(OPTIMIZER, paged_bytes=round(paged * GIB), paged_tensors=4, is_paged=True)
    samples = [reading(31, 23), reading(45, used), reading(46, used - 1)]
    found = memory(
        story(peaks, *([state] if other else [])), samples, replace(SEEN, used_before_bytes=round(before * GIB))
    )
    if other:
        rest = found.metrics["vram/other_gib"]
        assert before + reserved + paged + rest == pytest.approx(used, abs=1e-6)
        assert found.metrics["vram/optimizer_paged_gib"] == pytest.approx(paged, abs=1e-6)
        assert (found.metrics["vram/optimizer_gib"], found.metrics["vram/optimizer_eligible_gib"]) == (1.0, 1.0)
    else:
        assert found.absent["vram/other_gib"]


@pytest.mark.parametrize(
    ("seen", "samples"),
    [(replace(SEEN, used_before_bytes=None), [reading(45, 5)]), (SEEN, []), (SEEN, [reading(31, 5)])],
)
def test_what_is_left_is_absent_with_a_reason_where_a_part_is_not_known(seen: HostFacts, samples: list[Sample]) -> None:
    found = memory(story(TRAINING, OPTIMIZER), samples, seen)
    assert found.absent["vram/other_gib"]
    assert "vram/other_gib" not in found.metrics


@pytest.mark.parametrize(
    ("is_paged", "tensors", "told"), [(True, 0, True), (True, 2, False), (False, 0, False), (False, 2, False)]
)
def test_a_paged_optimizer_that_pages_nothing_says_so(is_paged: bool, tensors: int, told: bool) -> None:
    state = replace(OPTIMIZER, is_paged=is_paged, paged_tensors=tensors, paged_bytes=tensors * 10**6)
    found = memory(story(TRAINING, state), [])
    assert any("pages nothing" in warning for warning in found.warnings) == told
    assert found.metrics["vram/optimizer_paged_tensors"] == tensors


@pytest.mark.parametrize(
    ("change", "gib"),
    [
        ({"reserved_bytes": 11 * GIB, "device_used_bytes": 8 * GIB}, 3.0),
        ({"peak_reserved_bytes": 26 * GIB}, 2.0),
        ({"reserved_bytes": 8 * GIB, "device_used_bytes": 9 * GIB}, None),
        ({"reserved_bytes": 8 * GIB + 2**27, "device_used_bytes": 8 * GIB}, None),
        ({"reserved_bytes": None, "device_used_bytes": 0}, None),
        ({"reserved_bytes": 8 * GIB, "device_used_bytes": None}, None),
    ],
)
def test_memory_that_the_card_does_not_hold_was_spilled(change: dict[str, int | None], gib: float | None) -> None:
    events = [
        replace(event, **change) if isinstance(event, PhaseMemory) and event.phase == "window" else event  # type: ignore[arg-type]
        for event in story(TRAINING)
    ]
    assert memory(events, []).metrics.get("vram/spilled_gib") == gib


@pytest.mark.parametrize(
    ("seen", "peaks", "why"),
    [
        (replace(SEEN, card_bytes=None), {}, "GPUs only"),
        (SEEN, {}, "gone before"),
        (SEEN, {"model": (1.0, 1.0)}, "gone before"),
    ],
)
def test_training_without_the_allocators_word_says_why(
    seen: HostFacts, peaks: dict[str, tuple[float, float]], why: str
) -> None:
    found = memory(story(peaks), [], seen)
    assert why in found.absent["vram/peak_allocated_gib"]
    assert why in found.absent["vram/peak_reserved_gib"]
