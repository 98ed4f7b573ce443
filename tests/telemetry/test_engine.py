"""What compiling took, and whether training ran as it had been made ready."""

from dataclasses import replace

import pytest

from lora_lab.events import Compiled, EngineDone, Event, PhaseBegan
from lora_lab.phase import Phase
from lora_lab.telemetry.engine import add_engine
from lora_lab.telemetry.figures import GIB, Summary

COMPILED = Compiled(t=0, seconds=21.8, shapes=[[2, 2048], [2, 1024]], graphs=True, working_bytes=3 * GIB)
DONE = EngineDone(t=1, replays=40, unrecorded=0, compilations=2)
BEGAN = PhaseBegan(t=0, phase=Phase.compilation.value)
FIGURES = {
    "engine/compile_seconds": 21.8,
    "engine/shapes": 2.0,
    "engine/late_compilations": 2.0,
    "engine/replayed_micro_batches": 40.0,
    "engine/unrecorded_micro_batches": 0.0,
    "engine/graph_working_gib": 3.0,
}
OF_TRAINING = {"engine/late_compilations", "engine/replayed_micro_batches", "engine/unrecorded_micro_batches"}
OF_GRAPHS = {"engine/replayed_micro_batches", "engine/unrecorded_micro_batches", "engine/graph_working_gib"}


@pytest.mark.parametrize(
    ("events", "missing", "why"),
    [
        ([BEGAN, COMPILED, DONE], set(), ""),
        ([], set(FIGURES), "nothing was compiled"),
        ([BEGAN], set(FIGURES), "the compilation was not completed"),
        ([BEGAN, COMPILED], OF_TRAINING, "training did not come to its end"),
        ([BEGAN, replace(COMPILED, graphs=False, working_bytes=0), DONE], OF_GRAPHS, "no CUDA graph was recorded"),
    ],
    ids=["whole", "eager", "stopped in compiling", "stopped in training", "no graphs"],
)
def test_each_figure_is_there_or_has_a_reason(events: list[Event], missing: set[str], why: str) -> None:
    summary = Summary()
    add_engine(summary, events)
    assert summary.metrics == {name: value for name, value in FIGURES.items() if name not in missing}
    assert summary.absent.keys() == missing
    assert all(why in reason for reason in summary.absent.values())


@pytest.mark.parametrize(
    ("regime", "graphs", "told"),
    [
        ("host-bound", True, True),
        ("mixed", True, True),
        ("GPU-bound", True, False),
        ("host-bound", False, False),
        (None, True, False),
    ],
)
def test_a_replayed_step_that_waits_is_told(regime: str | None, graphs: bool, told: bool) -> None:
    """An H100 worked for 45 % of the time with paged AdamW at 1x512."""
    summary = Summary(metrics={"throughput/gpu_busy_share": 0.4529}, tags={"regime": regime} if regime else {})
    add_engine(summary, [BEGAN, replace(COMPILED, graphs=graphs), DONE])
    assert [("45 % of the time" in text, "optimizer=adamw_fused" in text) for text in summary.warnings] == (
        [(True, True)] if told else []
    )
