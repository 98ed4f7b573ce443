"""What is left when a process is killed or interrupted in the middle of a trial."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_server import Running
from conftest import lab_in, record_of, started, store_of, until

LONG = (
    *("model=tiny", "data=random_tokens", "data.rows=16", "seq_len=64"),
    *("measure.warmup_steps=1", "measure.steps=100000", "measure.eval_rows=2"),
)


@pytest.fixture
def long_trial(tmp_path: Path) -> Iterator[Running]:
    """A trial that would take hours, three steps into its window, in a process group of its own."""
    with started(tmp_path, *LONG) as parent:
        until(lambda: sum(e["event"] == "Step" for e in events_in(tmp_path)) > 3, "three steps")
        yield parent


def events_in(folder: Path) -> list[dict[str, Any]]:
    lines = [line for path in folder.glob("multirun/*/*/events.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def worker_pid(folder: Path) -> int:
    return int(next(event["pid"] for event in events_in(folder) if event["event"] == "Ready"))


def test_a_killed_worker_is_a_recorded_outcome(long_trial: Running, tmp_path: Path) -> None:
    os.kill(worker_pid(tmp_path), signal.SIGKILL)
    out, _ = long_trial.communicate(timeout=60)
    assert long_trial.returncode == 1, out
    assert "the worker was ended by SIGKILL" in out
    client, [run] = store_of(tmp_path)
    assert run.info.status == "KILLED"
    assert (run.data.tags["outcome"], run.data.tags["phase"]) == ("killed", "window")
    assert len(client.get_metric_history(run.info.run_id, "Steps/loss")) > 3, "what was measured until then is kept"


def test_ctrl_c_ends_the_worker_records_and_exits_130(long_trial: Running, tmp_path: Path) -> None:
    worker = psutil.Process(worker_pid(tmp_path))
    os.killpg(long_trial.pid, signal.SIGINT)
    out, _ = long_trial.communicate(timeout=60)
    assert long_trial.returncode == 130, out
    assert "Traceback" not in out
    assert not worker.is_running()
    _, [run] = store_of(tmp_path)
    assert run.data.tags["reason"] == "interrupted by Ctrl-C"
    assert record_of(tmp_path)["outcome"] == "killed"


def test_a_killed_parent_takes_its_worker_along(long_trial: Running, tmp_path: Path) -> None:
    worker = psutil.Process(worker_pid(tmp_path))
    os.kill(long_trial.pid, signal.SIGKILL)
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker's end", seconds=20)
    assert sum(event["event"] == "Step" for event in events_in(tmp_path)) > 3, "its events are on disk"
    assert store_of(tmp_path)[1] == [], "nothing is said to run; test_outbox.py has the next start"


def test_a_trial_that_takes_too_long_is_ended_and_recorded(tmp_path: Path) -> None:
    said = lab_in(tmp_path)(*LONG, "timeout_minutes=0.15", "measure.steps=1000000")
    assert said.code == 1, said.text
    client, [run] = store_of(tmp_path)
    assert (run.data.tags["outcome"], run.data.tags["phase"]) == ("timed_out", "window")
    assert "timeout_minutes=0.15" in run.data.tags["reason"]
    assert len(client.get_metric_history(run.info.run_id, "Steps/loss")) > 3
