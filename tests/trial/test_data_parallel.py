"""One trial by two workers on the CPU, through the real command line: it trains as one process with all their rows, and
whatever happens to one of them ends both."""

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import FAKES, compiles, lab_in, record_of, records_in, some_by_day
from safetensors.torch import load_file

TINY = ("model=tiny", "device=cpu", "tracking=none", "share_device=true", "measure.answers=0", "measure.general_rows=0")
TOGETHER = ("placement=ddp", "placement.workers=2")
LEARNS = (
    *("data=instruct", "data.path=rows.jsonl", "method=lora", "precision=fp32", "seq_len=160"),
    *("optimizer.optim=sgd", "learning_rate=0.5", "max_grad_norm=0.5"),
    *("measure.warmup_steps=1", "measure.steps=9", "measure.eval_rows=5", "grad_accum_steps=2"),
)
"""By SGD, so that weights differ by no more than gradients do; they are clipped. Ten steps, the first to warm up."""


def write_rows(folder: Path) -> None:
    """Rows of very different lengths, so that no two workers have as many tokens."""
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 41)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    [journal] = folder.glob("multirun/*/*/events.jsonl")
    return [event for event in map(json.loads, journal.read_text().splitlines()) if event["event"] == kind]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("multirun/*/*/adapter/adapter_model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trial by one process, which has all rows of a step."""
    folder = tmp_path_factory.mktemp("alone")
    write_rows(folder)
    said = lab_in(folder)(*TINY, *LEARNS, "batch_size=4")
    assert said.code == 0, said.text
    return folder


@pytest.mark.parametrize("engine", ["eager", pytest.param("compile", marks=[compiles, pytest.mark.nightly])])
def test_two_workers_train_as_one_process_with_the_rows_of_both(alone: Path, tmp_path: Path, engine: str) -> None:
    write_rows(tmp_path)
    said = lab_in(tmp_path)(*TINY, *LEARNS, *TOGETHER, "batch_size=2", f"engine={engine}")
    assert said.code == 0, said.text
    steps, expected = events_of(tmp_path, "Step"), events_of(alone, "Step")
    assert len(steps) == len(expected) == 10
    for name in ("step", "rows", "real", "trained", "attended"):
        assert [step[name] for step in steps] == [step[name] for step in expected], name
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], rel=1e-5)
    for phase, asked in zip(events_of(tmp_path, "RowLosses"), events_of(alone, "RowLosses"), strict=True):
        assert (phase["digest"], phase["tokens"]) == (asked["digest"], asked["tokens"])
        assert phase["nats"] == pytest.approx(asked["nats"], rel=1e-4)
    mine, theirs = adapter_of(tmp_path), adapter_of(alone)
    assert mine.keys() == theirs.keys()
    changed = sum(float(weights.abs().sum()) for name, weights in theirs.items() if "lora_B" in name)
    assert changed > 0.01, "B begins at zero"
    for name, weights in theirs.items():
        torch.testing.assert_close(mine[name], weights, rtol=1e-4, atol=1e-6)
    record = record_of(tmp_path)
    tags, params = record["tags"], record["params"]
    assert (tags["world_size"], tags["ran.world_size"], tags["ran.gradients_carried_by"]) == ("2", "2", "gloo")
    assert tags["ran.adapters_equal"] == "True", "after the first step; after the last the trial itself has looked"
    assert (params["placement"], params["placement.workers"]) == ("ddp", "2")
    assert sorted(ready["rank"] for ready in events_of(tmp_path, "Ready")) == [0, 1]
    assert "world_size" not in record_of(alone)["tags"]


JOB = (
    *("data=instruct", "data.path=rows.jsonl", "precision=fp32", "seq_len=64", "batch_size=2", "measure.eval_rows=4"),
    *("measure.warmup_steps=1", "train.epochs=2", "train.checkpoint_every=4", "train.eval_every=4"),
)


@pytest.mark.nightly
def test_a_job_of_two_workers_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """The second worker is killed behind step 11, which is in the second epoch. Steps 9 to 11 are taken twice."""
    write_rows(tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"0.0002 rank 1": ["kill", "after step 11"]}))
    path = os.pathsep.join(filter(None, [str(FAKES / "saboteur"), os.environ.get("PYTHONPATH")]))
    said = lab_in(tmp_path)(*TINY, *JOB, *TOGETHER, PYTHONPATH=path, SABOTAGE=str(plan))
    assert (said.code, "rank 1: the worker was ended by SIGKILL" in said.out) == (1, True), said.text
    before = {step["step"]: step["loss"] for step in events_of(tmp_path, "Step")}
    [journal] = tmp_path.glob("multirun/*/*/events.jsonl")
    said = lab_in(tmp_path)("resume=true", f"hydra.run.dir={journal.parent}")
    assert said.code == 0, said.text
    steps = events_of(tmp_path, "Step")
    after = {step["step"]: step["loss"] for step in steps}
    assert min(after) == 9
    assert [after[number] for number in (9, 10)] == [before[number] for number in (9, 10)]
    rows = 36 // 4 * 4
    """Of the 40 rows a tenth is held out, and each epoch leaves out what does not fill a micro-batch of both."""
    assert max(after) == 2 * rows // 4
    assert all(step["rows"] == 4 for step in steps)
    record = record_of(tmp_path)
    assert (record["outcome"], record["tags"]["ran.adapters_equal"]) == ("finished", "True")


@pytest.mark.nightly
def test_after_a_spike_all_workers_stop_or_go_back_together(tmp_path: Path) -> None:
    write_rows(tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"0.0002": ["spike", "in data"]}))
    path = os.pathsep.join(filter(None, [str(FAKES / "saboteur"), os.environ.get("PYTHONPATH")]))
    said = lab_in(tmp_path)(
        *("-m", *TINY, *JOB, *TOGETHER, "train.epochs=1", "train.on_spike=stop,lower_lr"),
        PYTHONPATH=path,
        SABOTAGE=str(plan),
    )
    assert said.code == 0, said.text
    found = {record["params"]["train.on_spike"]: record for record in records_in(tmp_path)}
    assert (found["stop"]["outcome"], found["stop"]["tags"]["reason"]) == ("diverged", "a spike at step 7")
    assert found["lower_lr"]["outcome"] == "finished"
    spikes = {}
    for journal in tmp_path.glob("multirun/2*/*/*/events.jsonl"):
        events = [json.loads(line) for line in journal.read_text().splitlines()]
        [spiked] = [event for event in events if event["event"] == "Spiked"]
        spikes[spiked["action"]] = spiked
        resumed = [event["step"] for event in events if event["event"] == "Resumed"]
        assert resumed == ([4] if spiked["action"] == "lower_lr" else [])
    assert spikes.keys() == {"stop", "lower_lr"}
    assert len(set(spikes["stop"]["rows"])) == 4, "the rows of both workers"


FAULTS = {
    "0.001": ("kill", "killed", "rank 1: the worker was ended by SIGKILL"),
    "0.002": ("huge tensor", "out_of_memory", "rank 1: "),
    "0.003": ("stop", "failed", "rank 1: the worker hangs"),
    "0.004": ("nudge", "failed", "rank 1 are not those of rank 0 after training"),
}
"""By learning rate: what happens to the second worker, the outcome, and what the reason says."""


@pytest.mark.parametrize("rates", some_by_day([["0.001", "0.004"], ["0.002", "0.003"]], by_day=[["0.001", "0.004"]]))
def test_what_happens_to_one_worker_ends_the_other_and_is_recorded(tmp_path: Path, rates: list[str]) -> None:
    chosen = {rate: FAULTS[rate] for rate in rates}
    plan = tmp_path / "plan.json"
    acts = {f"{rate} rank 1": [act, "after step 2"] for rate, (act, _, _) in chosen.items()}
    plan.write_text(json.dumps({**acts, "patience": ["1", ""]}))
    path = os.pathsep.join(filter(None, [str(FAKES / "saboteur"), os.environ.get("PYTHONPATH")]))
    trial = ("data=random_tokens", "data.rows=60", "seq_len=64", "measure.eval_rows=0", "measure.warmup_steps=1")
    began = time.monotonic()
    said = lab_in(tmp_path)(
        *("-m", *TINY, *TOGETHER, *trial, "measure.steps=8", f"learning_rate={','.join(chosen)}"),
        PYTHONPATH=path,
        SABOTAGE=str(plan),
    )
    assert said.code == 1, said.text
    assert time.monotonic() - began < 30 * len(chosen)
    found = {record["params"]["learning_rate"]: record for record in records_in(tmp_path)}
    for rate, (_, outcome, words) in chosen.items():
        assert (rate, found[rate]["outcome"]) == (rate, outcome)
        assert words in found[rate]["tags"]["reason"]
    journals = [path.read_text() for path in tmp_path.glob("multirun/**/events.jsonl")]
    pids = [event["pid"] for text in journals for event in map(json.loads, text.splitlines()) if "pid" in event]
    assert len(pids) == 2 * len(chosen)
    assert not any(psutil.pid_exists(pid) for pid in pids)
