"""SIGKILL at random instants of a sweep, then the same command again: nothing is lost and nothing is there twice.

`--nightly --kills N` sets how many instants; each is a test of its own, and in every third trials run side by side.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import KILLS, give_store, lab_in, started, store_of, until
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

SEED = 20
RATES = ("1e-4", "2e-4", "3e-4", "4e-4", "5e-4")
SWEEP = ("-m", "model=tiny", "measure=quick", "seq_len=32", "data=random_tokens", "data.rows=16", "measure.steps=1")
COMMAND = (*SWEEP, f"learning_rate={','.join(RATES)}")
SIDE_BY_SIDE = ("placement=each_gpu", "placement.workers=2") if len(os.sched_getaffinity(0)) > 1 else ()
MARKER = "LORA_LAB_TEST"
"""In the environment of every process of a round."""
LONGEST_SECONDS = 200


@dataclass(frozen=True)
class Instant:
    """When, and whom: some time after something is seen."""

    seen: str
    after: float
    victim: str = "the sweep"

    def __str__(self) -> str:
        return f"{self.victim} {self.after:.3f} s after {self.seen}"


def files(pattern: str) -> Callable[[Path], int]:
    return lambda folder: len(list(folder.glob(pattern)))


def ready(folder: Path) -> int:
    return sum('"Ready"' in path.read_text() for path in folder.glob("multirun/[!.]*/*/*/events.jsonl"))


SEEN: dict[str, tuple[Callable[[Path], int], int, float]] = {
    "a trial runs": (ready, len(RATES), 0.8),
    "a record": (files("multirun/[!.]*/*/*/record.json"), len(RATES), 0.25),
    "the folder": (files("multirun/[!.]*/*/.sweep.lock"), 1, 4.0),
    "a trial runs, its worker": (ready, len(RATES), 0.6),
    "a delivery": (files("multirun/[!.]*/*/*/delivered.json"), len(RATES), 0.3),
    "the start": (lambda _: 1, 1, 15.0),
    "the table": (files("multirun/[!.]*/*/trials.csv"), 1, 0.3),
    "the store's folder": (files("mlruns"), 1, 4.0),
    "the plan": (files("multirun/[!.]*/*/sweep.json"), 1, 0.4),
    "a trial": (files("multirun/[!.]*/*/*/trial.json"), len(RATES), 0.3),
}
"""What an instant can follow: how to count it, how often it happens, and the longest time after it."""


def instant(random_: random.Random, seen: str) -> tuple[Instant, int]:
    """Some time after something has happened; and the how-manieth time that is."""
    _, times, longest = SEEN[seen]
    victim = "a worker" if "worker" in seen else "the sweep"
    return Instant(seen, random_.uniform(0, longest), victim), random_.randint(1, times)


@dataclass
class Round:
    """One sweep that is killed, and what became of it."""

    folder: Path
    temporary: Path
    """Where trials queue for the device: away from those of other tests that may run now."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    instants: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    attempts: int = 0

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", MARKER: self.mark, "TMPDIR": str(self.temporary)}
        with (self.folder / "said.txt").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "lora_lab", *COMMAND, *more],
                cwd=self.folder,
                env={**os.environ, **own},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def kill_at(self, sweep: subprocess.Popen[bytes], when: Instant, how_often: int) -> None:
        """Wait for the instant, kill, and note what that hit."""
        count, before, end = SEEN[when.seen][0], 0, time.monotonic() + LONGEST_SECONDS
        if when.seen != "the start":
            before = count(self.folder) if self.phases else 0
        while sweep.poll() is None and count(self.folder) < before + how_often:
            assert time.monotonic() < end, f"not seen: {when}"
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            sweep.wait(when.after)
        hit = phase(self.folder)
        if sweep.poll() is not None:
            self.phases.append("over before")
        elif when.victim == "the sweep":
            sweep.kill()
            sweep.wait()
            self.phases.append(phase(self.folder))
        elif self.kill_worker():
            self.phases.append(f"worker: {hit}")
        else:
            self.phases.append("worker: gone already")
        self.instants.append(str(when))

    def kill_worker(self) -> bool:
        for said in reversed(events(self.folder)):
            if said["event"] == "Ready":
                with contextlib.suppress(psutil.Error):
                    worker = psutil.Process(said["pid"])
                    if worker.environ().get(MARKER) == self.mark:
                        worker.kill()
                        return True
                return False
        return False

    def processes(self) -> list[str]:
        """What of this round still runs."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARKER) == self.mark:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
        return found


def events(folder: Path) -> list[dict[str, Any]]:
    """What the latest trial has said."""
    found = sorted(folder.glob("multirun/[!.]*/*/*/events.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    lines = found[-1].read_text().splitlines() if found else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def phase(folder: Path) -> str:
    """What a sweep was doing, as its files tell."""
    if not any(folder.glob("multirun/[!.]*/*/sweep.json")):
        if any(folder.glob("multirun/[!.]*/*/.sweep.lock")):
            return "checking the points"
        return "making the store" if any(folder.glob("mlruns/tmp*")) else "start-up"
    if not any(folder.glob("multirun/2*/*/delivered.json")):
        return "plan"
    attempts = [path for path in folder.glob("multirun/2*/*/*") if path.is_dir()]
    for attempt in attempts:
        if not (attempt / "trial.json").exists():
            return "beginning a trial"
        if not (attempt / "record.json").exists():
            said = [event["event"] for event in events(folder)]
            return "record" if "Ended" in said else "trial" if "Ready" in said else "starting a worker"
        if not (attempt / "delivered.json").exists():
            return "delivery"
    return "end" if any(folder.glob("multirun/[!.]*/*/trials.csv")) else "between trials"


@pytest.fixture
def round_(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Round]:
    """A folder for one round; whatever happens no process of it is left, and what it hit is counted."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # a short path: sockets go there
        this = Round(tmp_path, Path(temporary))
        yield this
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARKER) == this.mark:
                    process.kill()
    with (tmp_path / "said.txt").open("a") as said:
        said.write(f"\nkilled: {list(zip(this.instants, this.phases, strict=True))}, {this.attempts} attempts\n")
    for hit in this.phases:
        request.config.stash[KILLS]["phases"][hit] += 1
    request.config.stash[KILLS]["rounds"]["attempts"] += this.attempts


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--kills")))


@pytest.mark.nightly
def test_a_sweep_killed_at_any_instant_is_taken_up_where_it_stopped(
    number: int, round_: Round, empty_store: Path
) -> None:
    random_ = random.Random(f"{SEED} {number}")
    seen = list(SEEN)[number % len(SEEN)]
    if seen not in ("the store's folder", "the start"):
        give_store(round_.folder, empty_store)
    how = SIDE_BY_SIDE if number % 3 == 2 else ()
    sweep = round_.start(*how)
    round_.kill_at(sweep, *instant(random_, seen))
    code = sweep.wait(LONGEST_SECONDS)
    assert code in (0, 1, -signal.SIGKILL), told(round_)
    if number % 5 == 1:
        sweep = round_.start(*how, "resume=true")
        round_.kill_at(sweep, *instant(random_, random_.choice(list(SEEN))))
        sweep.wait(LONGEST_SECONDS)
    assert round_.start(*how, "resume=true").wait(LONGEST_SECONDS) == 0, told(round_)
    round_.attempts = refuse_losses(round_)
    until(lambda: not round_.processes(), "the end of every process of the round", seconds=60)


@pytest.mark.nightly
def test_a_sweep_killed_after_its_last_trial_is_finished_by_the_next_start(tmp_path: Path, empty_store: Path) -> None:
    give_store(tmp_path, empty_store)
    count = SEEN["a record"][0]
    with started(tmp_path, *COMMAND) as sweep:
        until(lambda: count(tmp_path) == len(RATES), "the last record", pause=0.002)
        sweep.kill()
        assert sweep.wait() == -signal.SIGKILL
    resumed = lab_in(tmp_path)(*COMMAND, "resume=true")
    (tmp_path / "said.txt").write_text(resumed.text)
    assert resumed.code == 0, resumed.text
    refuse_losses(Round(tmp_path, tmp_path))


def told(round_: Round) -> str:
    """For whom a round has failed."""
    said = (round_.folder / "said.txt").read_text(errors="replace")
    return f"{round_.folder}: {list(zip(round_.instants, round_.phases, strict=True))}\n{said[-5000:]}"


def refuse_losses(round_: Round) -> int:
    """Every point is measured once, on disk and in the store, and every attempt is in both; how many there were."""
    [plan] = [json.loads(path.read_text()) for path in round_.folder.glob("multirun/[!.]*/*/sweep.json")]
    assert len(plan["trials"]) == len(RATES), told(round_)
    attempts = [json.loads(path.read_text()) for path in round_.folder.glob("multirun/[!.]*/*/*/trial.json")]
    records = [json.loads(path.read_text()) for path in round_.folder.glob("multirun/[!.]*/*/*/record.json")]
    points = {trial["point"] for trial in plan["trials"]}
    assert len(points) == len(RATES)
    finished = [record["tags"]["point"] for record in records if record["outcome"] == "finished"]
    assert sorted(finished) == sorted(points), f"on disk: {told(round_)}"
    assert {record["id"] for record in records} == {attempt["record"]["id"] for attempt in attempts}, told(round_)

    client, runs = store_of(round_.folder)
    assert not [run for run in runs if run.info.status == "RUNNING"], told(round_)
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}, told(round_)
    done = [run.data.tags["point"] for run in nested if run.info.status == "FINISHED"]
    assert sorted(done) == sorted(points), f"in the store: {told(round_)}"
    assert Counter(run.data.tags["record_id"] for run in nested) == Counter(r["id"] for r in records), told(round_)
    for run in nested:
        refuse_half_a_run(client, run, round_)
    assert parent.info.status == "FINISHED", f"the sweep's own run: {told(round_)}"
    assert parent.data.metrics["sweep/finished"] == len(RATES), told(round_)
    return len(attempts)


def refuse_half_a_run(client: MlflowClient, run: Run, round_: Round) -> None:
    """A finished run has its series once; a run that was cut off says so and has the files there were."""
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "environment.json", "trial.json", "summary.json"} <= names, (names, told(round_))
    if run.info.status == "FINISHED":
        losses = client.get_metric_history(run.info.run_id, "Steps/loss")
        assert [loss.step for loss in losses] == [1, 2], told(round_)
        assert run.data.tags["outcome"] == "finished"
        return
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed"), told(round_)
    assert {"events.jsonl"} <= names, (names, told(round_))
