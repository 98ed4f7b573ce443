"""One trial over two real cards: it trains as one card with the rows of both, under every engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import lab_in

from lora_lab.telemetry.nvml import visible_cards
from lora_lab.telemetry.sampler import SensorFailed


def cards_here() -> int:
    try:
        return len(visible_cards())
    except SensorFailed:
        return 0


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cards_here() < 2, reason="needs two NVIDIA cards")]

# shared, since tests before these may have left a context of this process on a card
SHORT = (
    *("model=tiny", "data=maths", "data.rows=400", "seq_len=256", "data.batching=seq_len", "tracking=none"),
    *("measure.warmup_steps=5", "measure.steps=20", "measure.idle_seconds=0", "measure.eval_rows=16"),
    *("measure.answers=0", "measure.general_rows=0", "cooldown_celsius=95", "share_device=true"),
    *("model.architecture.hidden_size=512", "model.architecture.intermediate_size=1024"),
)
TOGETHER = ("placement=ddp", "placement.gpus=2")
CASES = {
    "eager": ("method=lora", "precision=fp32", "engine=eager", "grad_accum_steps=2"),
    "graph": ("method=lora", "precision=bf16", "engine=graph"),
    "nf4": ("method=qlora", "precision=bf16", "engine=graph", "gradient_checkpointing=full", "grad_accum_steps=2"),
    "compile": ("method=qlora", "precision=fp16", "engine=compile"),
}
SHARED_OUT = {
    "eager": ("method=lora", "precision=bf16", "engine=eager", "gradient_checkpointing=full"),
    "compile": ("method=lora", "precision=bf16", "engine=compile", "engine.chunked_loss=true"),
    "nf4": ("method=qlora", "precision=bf16", "engine=compile", "gradient_checkpointing=offloaded"),
    "nf4 eager": ("method=qlora", "precision=bf16", "engine=eager", "grad_accum_steps=2", "measure.answers=2"),
}


def trial(folder: Path, name: str, *changes: str) -> dict[str, Any]:
    """The record of a finished trial, with the losses of its steps."""
    home = folder / name
    home.mkdir()
    said = lab_in(home, real=True)(*SHORT, *changes)
    assert said.code == 0, said.text
    [place] = home.glob("multirun/*/*/record.json")
    record: dict[str, Any] = json.loads(place.read_text())
    events = [json.loads(line) for line in (place.parent / "events.jsonl").read_text().splitlines()]
    record["steps"] = [event for event in events if event["event"] == "Step"]
    return record


@pytest.mark.parametrize("case", CASES)
def test_two_cards_train_as_one_with_the_rows_of_both(tmp_path: Path, case: str) -> None:
    alone = trial(tmp_path, "alone", *CASES[case], "batch_size=4")
    shared = trial(tmp_path, "shared", *CASES[case], *TOGETHER, "batch_size=2")
    assert shared["tags"]["ran.adapters_equal"] == "True", (
        "after the first steps; after the last the trial looks itself"
    )
    assert shared["tags"]["ran.gradients_carried_by"] == "nccl"
    assert shared["tags"]["ran.engine"] == alone["tags"]["ran.engine"]
    for name in ("rows", "real", "trained"):
        assert [step[name] for step in shared["steps"]] == [step[name] for step in alone["steps"]]
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(shared["steps"], alone["steps"], strict=True)]
    assert max(apart) < (1e-3 if case == "eager" else 0.02), apart
    metrics = shared["metrics"]
    assert metrics["loss/eval"] == pytest.approx(alone["metrics"]["loss/eval"], abs=0.02)
    assert metrics["card/foreign_processes"] == 0
    assert len(shared["tags"]["vram_by_card.reserved_gib"].split(", ")) == 2
    assert metrics["energy/joules"] > 0


@pytest.mark.parametrize("case", SHARED_OUT)
def test_cards_that_share_out_the_weights_train_as_with_whole_ones(tmp_path: Path, case: str) -> None:
    both = [
        trial(tmp_path, kind, *SHARED_OUT[case], f"placement={kind}", "placement.gpus=2", "batch_size=2")
        for kind in ("ddp", "fsdp")
    ]
    losses = [[step["loss"] for step in each["steps"]] for each in both]
    apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
    assert max(apart) < 0.01, apart
    whole, shared = both
    assert shared["metrics"]["loss/eval"] == pytest.approx(whole["metrics"]["loss/eval"], abs=0.01)
    held, everything = map(int, shared["tags"]["ran.base_bytes_held"].split(" of "))
    assert 0.5 <= held / everything <= 0.55
    assert shared["tags"]["ran.adapters_equal"] == "True"
    assert shared["tags"]["ran.engine"] == whole["tags"]["ran.engine"]
