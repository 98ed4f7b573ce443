"""SIGKILL at random instants of a whole training, of its worker or its parent, then resume=true: nothing is lost.

`--kills N` sets how often: N + 1 rounds, each with one kill or two."""

import contextlib
import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Lab, give_store, lab_in, started, store_of, until

SEED = 154
"""With it both rounds of a push hit the middle of the training."""
STEPS = 12
JOB = (
    *("model=tiny", "measure=quick", "seq_len=32", "data=random_tokens", "data.rows=16", "precision=fp32"),
    *(
        "method=lora",
        "method.dropout=0.1",
        f"train.max_steps={STEPS}",
        "train.eval_every=3",
        "train.checkpoint_every=4",
    ),
)
RESUME = ("resume=true", "hydra.run.dir=job")
LINES = 64
"""About as many events has the job."""
LONGEST_SECONDS = 200


@dataclass(frozen=True)
class Trained:
    """What came out of a job."""

    losses: list[tuple[int, float]]
    heldout: dict[int, float]
    adapter: bytes
    record: dict[str, Any]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def trained(folder: Path) -> Trained:
    record = json.loads((folder / "record.json").read_text())
    files = [*sorted(folder.glob("attempts/*/events.jsonl")), folder / "events.jsonl"]
    said = [event for file in files for event in lines_of(file)]
    return Trained(
        [(point["step"], point["value"]) for point in record["series"] if point["key"] == "step/loss"],
        {event["step"]: event["loss"] for event in said if event["event"] == "Evaluated" and event["step"]},
        (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        record,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("unbroken")
    said = lab_in(folder)(*JOB, "tracking=none", "hydra.run.dir=job")
    assert said.code == 0, said.text
    return trained(folder / "job")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--kills") + 1))


def kill_one(folder: Path, random_: random.Random, victim: str, *arguments: str) -> str:
    """Start the job, or resume it, and kill its parent or its worker behind a random event; what was hit."""
    line, late = random_.randint(1, LINES), random_.uniform(0, 0.05)
    said: list[dict[str, Any]] = []
    with started(folder, *arguments) as parent:
        end = time.monotonic() + LONGEST_SECONDS
        while not _has_ended(parent.pid):
            said = lines_of(folder / "job" / "events.jsonl") if (folder / "job" / "trial.json").exists() else []
            if len(said) >= line:
                break
            assert time.monotonic() < end, folder
            time.sleep(0.005)
        time.sleep(late)
        worker = next((event["pid"] for event in said if event["event"] == "Ready"), None)
        if victim == "worker" and worker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        else:
            parent.kill()
        parent.wait(LONGEST_SECONDS)
    return f"{victim} {late:.3f} s after event {line}: {said[-1]['event'] if said else 'none'}"


def _has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits only for being asked how it ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_job_killed_at_any_instant_and_resumed_is_the_job_that_was_not(
    number: int, tmp_path: Path, empty_store: Path, unbroken: Trained
) -> None:
    give_store(tmp_path, empty_store)
    random_ = random.Random(f"{SEED} {number}")
    victims = ["worker", "parent"]
    hit = [kill_one(tmp_path, random_, victims[number % 2], *JOB, "hydra.run.dir=job")]
    if number % 3 == 1:
        hit.append(kill_one(tmp_path, random_, random_.choice(victims), *RESUME))
    ended = tmp_path / "job" / "record.json"
    over = ended.exists() and json.loads(ended.read_text())["outcome"] == "finished"
    resumed = lab_in(tmp_path)(*RESUME)
    assert resumed.code == (2 if over else 0), f"{hit}\n{resumed.text}"

    print(hit)  # shown where the test fails
    found = trained(tmp_path / "job")
    assert found.losses == unbroken.losses, hit
    assert found.heldout == unbroken.heldout, hit
    assert found.adapter == unbroken.adapter, hit
    metrics = found.record["metrics"]
    assert (metrics["job/steps"], metrics["job/checkpoints"]) == (STEPS, STEPS / 4), hit
    assert metrics["job/best_heldout_loss"] == min(unbroken.heldout.values())
    assert metrics["window/steps"] >= 1
    assert not [path for path in (tmp_path / "job" / "checkpoints").iterdir() if not path.name.isdecimal()], hit
    again = lab_in(tmp_path, "lora_lab.recompute")("job")
    assert again.code == 0, f"{hit}\n{again.text}"
    refuse_two_runs(tmp_path, found.record)


def refuse_two_runs(folder: Path, record: dict[str, Any]) -> None:
    """The store has the record once, as it is in the end."""
    [run] = store_of(folder)[1]
    assert run.data.tags["record_id"] == record["id"]
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "finished")
    assert run.data.metrics["job/steps"] == STEPS
    store = f"sqlite:///{folder}/mlruns/mlflow.db"
    again = lab_in(folder, "lora_lab.recompute")(run.info.run_id, "--store", store)
    assert again.code == 0, again.text


@pytest.mark.nightly
def test_a_sweeps_job_goes_on_in_its_own_folder(lab: Lab, tmp_path: Path, empty_store: Path, unbroken: Trained) -> None:
    give_store(tmp_path, empty_store)
    sweep = ("-m", *JOB, "learning_rate=2e-4,1e-4", "hydra.sweep.dir=sweep")
    with started(tmp_path, *sweep) as parent:
        until(
            lambda: any("Checkpointed" in path.read_text() for path in tmp_path.glob("sweep/*/events.jsonl")), "saved"
        )
        parent.kill()
        parent.wait(LONGEST_SECONDS)
    said = lab(*sweep, "resume=true")
    assert said.code == 0, said.text
    assert sorted(path.name for path in tmp_path.glob("sweep/[0-9]*")) == ["0000", "0001"]
    assert [path.parts[-3] for path in tmp_path.glob("sweep/*/attempts/1")] != []
    found = [trained(path) for path in tmp_path.glob("sweep/[0-9]*")]
    assert [each.record["outcome"] for each in found] == ["finished"] * 2
    assert unbroken.losses in [each.losses for each in found]
    ids = [run.data.tags["record_id"] for run in store_of(tmp_path)[1] if "mlflow.parentRunId" in run.data.tags]
    assert sorted(ids) == sorted(each.record["id"] for each in found)


def test_what_cannot_be_resumed_is_refused_and_stays_as_it_is(lab: Lab, tmp_path: Path, unbroken: Trained) -> None:
    begun = lab(*JOB, "tracking=none", "hydra.run.dir=job", "timeout_minutes=0.0001")
    assert "timed_out" in begun.text
    before = {path: path.read_bytes() for path in tmp_path.glob("job/*.json*")}

    def refused(*arguments: str) -> str:
        said = lab(*arguments)
        assert said.code == 2, said.text
        assert {path: path.read_bytes() for path in tmp_path.glob("job/*.json*")} == before
        return said.err

    given = refused(*RESUME, "learning_rate=1e-5", "data.rows=16", "method=qlora", "capacity=8gib")
    assert "learning_rate=1e-05 was given, but the job was begun with learning_rate=0.0002" in given
    assert "method=qlora was given, but the job was begun with method=lora" in given
    assert ("data.rows" in given, "capacity cannot be given" in given) == (False, True)
    assert "hydra.run.dir=FOLDER" in refused("resume=true", "hydra.run.dir=nowhere")
    assert "hydra.run.dir=FOLDER" in refused("resume=true")
    assert not (tmp_path / "nowhere").exists()

    said = lab(*RESUME, *JOB, "tracking=none", "timeout_minutes=null", "device=cpu")
    assert said.code == 0, said.text
    assert trained(tmp_path / "job").losses == unbroken.losses, "no checkpoint is no reason not to begin"
    assert "has finished" in lab(*RESUME).err
    lab("model=tiny", "measure=quick", "seq_len=32", "data=random_tokens", "tracking=none", "hydra.run.dir=window")
    assert "not a job" in lab("resume=true", "hydra.run.dir=window").err
