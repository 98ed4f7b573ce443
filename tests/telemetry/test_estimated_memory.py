"""How far an estimate of memory was off is said only where what was measured is what was estimated."""

from dataclasses import replace

import pytest

from lora_lab.events import Event, PhaseMemory, Step
from lora_lab.phase import FIRST_STEP, Phase
from lora_lab.telemetry.estimated import add_estimate
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.host_facts import HostFacts, MemoryEstimate

SAID = MemoryEstimate(
    allocated=4 * GIB,
    reserved=5 * GIB,
    card=6 * GIB,
    low=3 * GIB,
    enough=6 * GIB,
    high=7 * GIB,
    slots=2 * 512,
    verdict="fits",
)
MEASURED = {"vram/peak_allocated_gib": 5.0, "vram/peak_reserved_gib": 4.0, "vram/peak_process_gib": 8.0}
ERRORS = {"estimate/allocated_error": -0.2, "estimate/reserved_error": 0.25, "estimate/card_error": -0.25}


def step(slots: int) -> Step:
    return Step(t=0.0, step=1, seconds=1.0, loss=2.0, rows=2, slots=slots, real=9, trained=9, skipped=False)


def took(phase: str, gib: float, retries: int = 0) -> PhaseMemory:
    size = round(gib * GIB)
    return PhaseMemory(t=0.0, phase=phase, peak_allocated_bytes=size, peak_reserved_bytes=size, retries=retries)


EVENTS: list[Event] = [
    took(Phase.evaluation_before.value, 9.0, retries=3),  # before training: nothing of it is left by then
    step(slots=300),
    took(FIRST_STEP, 5.0),
    step(slots=2 * 512),
    took(Phase.window.value, 4.0),
    took(Phase.evaluation.value, 4.5),
]


def summary_of(
    *more: Event, metrics: dict[str, float] = MEASURED, seen: HostFacts | None = None, has_finished: bool = True
) -> Summary:
    summary = Summary(metrics=dict(metrics), absent={"vram/peak_process_gib": "the driver does not list it"})
    add_estimate(summary, [*EVENTS, *more], seen or HostFacts(estimate=SAID), has_finished)
    return summary


def errors(summary: Summary) -> dict[str, float]:
    found = {name: value for name, value in summary.metrics.items() if name.endswith("_error")}
    assert found.keys() | {name for name in summary.absent if name in ERRORS} == ERRORS.keys()
    assert not found.keys() & summary.absent.keys()
    return found


def test_an_error_is_what_was_said_over_what_was_measured() -> None:
    summary = summary_of()
    assert errors(summary) == pytest.approx(ERRORS)
    assert [summary.metrics[f"estimate/{name}_gib"] for name in ("allocated", "reserved", "card")] == [4, 5, 6]
    assert [summary.metrics[f"estimate/{name}_gib"] for name in ("low", "enough", "high")] == [3, 6, 7]
    assert summary.tags["estimate_verdict"] == "fits"


def test_paged_state_is_added_to_the_process_whose_figure_leaves_it_out() -> None:
    found = errors(summary_of(metrics=MEASURED | {"vram/optimizer_paged_gib": 2.0}))
    assert found == pytest.approx(ERRORS | {"estimate/card_error": -0.4})


def test_without_a_measurement_the_error_is_absent_for_its_reason() -> None:
    summary = summary_of(metrics={name: gib for name, gib in MEASURED.items() if "process" not in name})
    assert errors(summary).keys() == {"estimate/allocated_error", "estimate/reserved_error"}
    assert summary.absent["estimate/card_error"] == "the driver does not list it"


def test_shorter_rows_are_not_compared() -> None:
    longer = HostFacts(estimate=replace(SAID, slots=2 * 600))
    summary = summary_of(seen=longer)
    assert errors(summary) == {}
    assert "1,024 of 1,200" in summary.absent["estimate/card_error"]


@pytest.mark.parametrize("phase", [Phase.evaluation, Phase.checkpoint])
def test_a_job_whose_peak_is_not_a_steps_is_not_compared(phase: Phase) -> None:
    assert errors(summary_of(took(phase.value, 5.5))) == {}


def test_where_torch_gave_memory_back_only_live_tensors_are_compared() -> None:
    assert errors(summary_of(took(Phase.window.value, 4.0, retries=1))).keys() == {"estimate/allocated_error"}


def test_a_trial_that_did_not_finish_keeps_its_estimate_alone() -> None:
    summary = summary_of(has_finished=False)
    assert errors(summary) == {}
    assert summary.metrics["estimate/high_gib"] == 7


def test_without_an_estimate_every_figure_has_the_reason() -> None:
    summary = summary_of(seen=HostFacts(no_estimate="another family"))
    assert errors(summary) == {}
    absent = {name: why for name, why in summary.absent.items() if name.startswith("estimate/")}
    assert len(absent) == 9
    assert set(absent.values()) == {"another family"}
    assert "estimate_verdict" not in summary.tags
