"""What this code says of trials whose memory was measured on a card: the stored tables are made of the same answers."""

from typing import Any

import pytest

from benchmarks.compose import compose
from benchmarks.fit_cases import cases, held_out
from benchmarks.full_training import CELLS
from benchmarks.reports import stored
from benchmarks.small_cards import CASES, case_of
from lora_lab.fit.estimate import GIB, estimate
from lora_lab.fit.shapes import shapes_of

TRAINING = ("first_step", "warm_up", "window")


@pytest.fixture(autouse=True)
def _nothing_cached(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def measured(trial: dict[str, Any]) -> tuple[float, float]:
    """The peaks of live tensors and of what was reserved in training."""
    live, reserved = (
        max(trial["phases"][phase][place] or 0 for phase in TRAINING if phase in trial["phases"]) for place in (0, 1)
    )
    return live, reserved


LISTED = cases() | {name: overrides for name, overrides in held_out().items() if "gemma2" not in name}
"""Without Gemma 2, whose attention=eager allocates in another order than is written down."""
TRIALS = {
    name: trial
    for name, trial in stored("h200/fit_memory_expandable")["trials"].items()
    # graph has given up a buffer since
    if name in LISTED and trial["outcome"] == "finished" and "graph" not in name.split()
}


MIXTURES = [name for name in TRIALS if "mixtral" in name or "moe" in name]


@pytest.mark.parametrize("name", dict.fromkeys([*list(TRIALS)[::6], *MIXTURES]))
def test_short_trials_with_segments_that_grow(name: str) -> None:
    config = compose(LISTED[name])
    said = estimate(config, shapes_of(config.model), expandable=True)
    live, reserved = measured(TRIALS[name])
    assert said.allocated == pytest.approx(live, rel=0.05)
    assert said.reserved == pytest.approx(reserved, rel=0.08)
    # the interval covers loading too, which takes more than a step of a mixture
    ever = max(memory[1] or 0 for phase, memory in TRIALS[name]["phases"].items() if phase != "matmul_rate")
    assert said.low < ever + said.libraries.size < said.high


SMALL = stored("h200/small_cards")["trials"]
WITHIN = "4c3a762"
"""The commit of trials whose checkpointed layers are calculated again within their compiled code."""


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SMALL], ids=lambda case: case.name)
def test_trials_of_graph_on_small_cards(case: Any) -> None:
    """One of them ran out of memory with nothing left for the rest of its step, so its peak is nearly the step's. Known
    and not yet explained: about one tensor of the hidden size is missing for the longest rows, 0.3 GiB of what is
    reserved where layers are in host memory, and about four tensors of the hidden size are too many where compiled
    layers are calculated again within their code."""
    said = case_of(case).said
    live, reserved = measured(SMALL[case.name])
    apart = 0.05 if case.length > 32768 else 0.03
    more = 0.07 if SMALL[case.name]["commit"].startswith(WITHIN) else 0.0
    assert 1 - apart <= said.allocated / live <= 1 + apart + more
    if SMALL[case.name]["outcome"] == "finished":
        apart = 0.12 if "host_layers" in case.settings else 0.05
        assert 1 - apart <= said.reserved / reserved <= 1 + apart + more
        assert said.verdict((case.card or 140) * GIB) != "too large"
    else:
        assert said.verdict(case.card * GIB) != "fits"


FULL = stored("h200/full_training")["turns"]
CHANGED = {"adamw, in 8 bit within the backward": "the gradient of its head is summed in bf16 since"}


@pytest.mark.parametrize("turn", [turn for turn in FULL if turn["name"] not in CHANGED], ids=lambda turn: turn["name"])
def test_full_training_takes_what_is_said(turn: dict[str, Any]) -> None:
    config = compose(CELLS[turn["cell"]][turn["name"]])
    said = estimate(config, shapes_of(config.model), expandable=True)
    assert turn["outcome"] == "finished"
    assert said.allocated / GIB == pytest.approx(turn["metrics"]["vram/peak_allocated_gib"], rel=0.03)
    assert said.reserved / GIB == pytest.approx(turn["metrics"]["vram/peak_reserved_gib"], rel=0.05)
