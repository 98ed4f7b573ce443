"""Stores that are locked, full, stopped or gone, and processes that were killed: no trial is lost, and the next start
brings the store up to date."""

import contextlib
import io
import json
import re
import shutil
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from command_server import Running
from conftest import Said, Server, SmallDisk, give_store, lab_in, records_in, started, store_of, until
from filelock import FileLock
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from quick_stores import MIGRATED

from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.outcome import End, Outcome
from lora_lab.store import outbox
from lora_lab.store.finishing import finish
from lora_lab.store.mlflow_store import Tracker, TrackingFailed, open_tracker
from lora_lab.store.outbox import Outbox, absolute, owner_tags
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Record
from lora_lab.store.recovery import recover
from lora_lab.store.sweep_folder import Plan, SweepFolder
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.sampler import Sample
from lora_lab.trial.session import look_after_earlier_runs

TINY = ("model=tiny", "measure=quick", "seq_len=32", "data=random_tokens", "data.rows=16", "measure.steps=1")
SWEEP = ("-m", *TINY, "learning_rate=1e-4,2e-4")
DEAD = 2**22 + 1
"""A pid that no process can have."""


def run(folder: Path, *arguments: str) -> Said:
    return lab_in(folder)(*arguments, OMP_NUM_THREADS="1")


def next_start(folder: Path, root: str = "mlruns") -> Said:
    """What every start does first, without the trial that takes most of a start's time."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        look_after_earlier_runs(Outbox(absolute(TrackingConfig(root=root))))
    return Said(0, out.getvalue(), "")


def end_of(process: Running) -> Said:
    out, _ = process.communicate()
    return Said(process.wait(), out, "")


def count(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


def delivered(folder: Path) -> int:
    """How many trials of sweeps the store has."""
    return count(folder, "multirun/*/*/*/delivered.json")


def steps_in(folder: Path, trial: str = "multirun/*/*") -> int:
    return sum(path.read_text().count('"Step"') for path in folder.glob(f"{trial}/events.jsonl"))


def late(said: Said) -> int:
    """How many records of earlier starts a start says that it has delivered."""
    return sum(
        map(int, re.findall(r"^records of earlier starts delivered to the store: (\d+)$", said.out, re.MULTILINE))
    )


def outcomes(folder: Path) -> Counter[str]:
    return Counter(record["outcome"] for record in records_in(folder))


def refuse_half_a_sweep(client: MlflowClient, runs: list[Run], trials: int = 2) -> None:
    """One sweep's run, and every trial's below it: ended, with series and files, each there once."""
    assert Counter(run.info.status for run in runs) == {"FINISHED": len(runs)}
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    [parent] = [run for run in runs if "axis.learning_rate" in run.data.params]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    assert (len(nested), len({run.data.tags["point"] for run in nested})) == (trials, trials)
    for run in nested:
        refuse_half_a_run(client, run)


def refuse_half_a_run(client: MlflowClient, run: Run) -> None:
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "finished")
    assert [loss.step for loss in client.get_metric_history(run.info.run_id, "Steps/loss")] == [1, 2]
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"adapter", "config.yaml", "events.jsonl", "summary.json", "trial.json"} <= names


# --- stores out of reach


def test_a_database_locked_for_a_whole_sweep_costs_nothing(tmp_path: Path, empty_store: Path) -> None:
    database = give_store(tmp_path, empty_store)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as somebody:
        somebody.execute("begin exclusive")
        said = run(tmp_path, *SWEEP)
        somebody.execute("rollback")
    assert said.code == 0, said.text
    assert "database is locked; the next start delivers the record" in said.out
    assert outcomes(tmp_path) == {"finished": 2}
    assert store_of(tmp_path)[1] == []
    assert late(next_start(tmp_path)) == 3
    client, runs = store_of(tmp_path)
    assert len(runs) == 3
    refuse_half_a_sweep(client, runs)


@pytest.mark.mounts
def test_a_full_disk_below_the_store_loses_no_trial(tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk", "64k") as disk:
        own = f"tracking.root={disk.path}/mlruns"
        disk.fill()
        said = run(tmp_path, *TINY, own)
        assert said.code == 0, said.text
        assert "the next start delivers the trial's record" in said.out
        assert outcomes(tmp_path) == {"finished": 1}
        assert not (disk.path / "mlruns" / "mlflow.db").exists()

        disk.resize("16m")
        with started(tmp_path, *SWEEP, own) as sweep:
            until(lambda: delivered(tmp_path) > 0, "the first trial's delivery")
            disk.fill(leave=100_000)  # the database can still be written to, an adapter does not fit
            said = end_of(sweep)
        assert said.code == 0, said.text
        assert late(said) == 1
        assert "the next start delivers the record" in said.out
        assert outcomes(tmp_path) == {"finished": 3}

        disk.resize("64m")
        assert late(next_start(tmp_path, f"{disk.path}/mlruns")) >= 1
        client, runs = store_of(disk.path)
        assert len(runs) == 4
        refuse_half_a_sweep(client, runs)
        for one in runs:
            if "axis.learning_rate" not in one.data.params:
                refuse_half_a_run(client, one)


@pytest.mark.nightly
@pytest.mark.mounts
def test_a_disk_that_fills_below_a_trial_costs_no_figures(tmp_path: Path, empty_store: Path) -> None:
    give_store(tmp_path, empty_store)
    with SmallDisk(tmp_path / "multirun", "16m") as disk:
        disk.fill()
        refused = run(tmp_path, *TINY)
        assert (refused.code, "nothing can be written to" in refused.err) == (2, True), refused.text
        assert "Traceback" not in refused.text

        disk.empty()
        with started(tmp_path, *TINY, "measure.steps=80") as trial:
            until(lambda: steps_in(tmp_path) > 3, "three steps")
            disk.fill()
            said = end_of(trial)
        assert said.code == 0, said.text
        assert "not everything could be written" in said.out
        refuse_a_lost_figure(tmp_path)

        next_start(tmp_path)  # sees a trial that has no whole record on disk
        refuse_a_lost_figure(tmp_path)
        disk.empty()
        next_start(tmp_path)
        refuse_a_lost_figure(tmp_path)


def refuse_a_lost_figure(folder: Path) -> None:
    """The one trial of 80 steps is in the store as it ended."""
    client, runs = store_of(folder)
    [one] = [run for run in runs if run.data.params["measure.steps"] == "80"]
    assert (one.info.status, one.data.tags["outcome"], one.data.tags["phase"]) == ("FINISHED", "finished", "done")
    assert len(client.get_metric_history(one.info.run_id, "Steps/loss")) == 81
    assert one.data.metrics["throughput/tokens_per_second"] > 0


def test_a_server_that_stops_midway_costs_nothing(tmp_path: Path) -> None:
    own = ("tracking=server", "tracking.experiment=shared")
    with Server(tmp_path / "server") as server:
        own = (*own, f"tracking.uri={server.uri}")
        with started(tmp_path, *SWEEP, *own) as sweep:
            until(lambda: delivered(tmp_path) > 0, "the first trial's delivery")
            server.stop()
            said = end_of(sweep)
        assert said.code == 0, said.text
        assert "the next start delivers the record" in said.out
        assert outcomes(tmp_path) == {"finished": 2}

        server.start()
        again = run(tmp_path, *TINY, *own)
        assert again.code == 0, again.text
        assert late(again) >= 1
        client = MlflowClient(tracking_uri=server.uri)
        runs = list(client.search_runs([client.get_experiment_by_name("shared").experiment_id]))
        assert len(runs) == 4
        refuse_half_a_sweep(client, runs)
        assert not (tmp_path / "mlruns").exists()


def test_a_database_deleted_midway_costs_nothing(tmp_path: Path, empty_store: Path) -> None:
    database = give_store(tmp_path, empty_store)
    with started(tmp_path, *SWEEP) as sweep:
        until(lambda: delivered(tmp_path) > 0, "the first trial's delivery")
        database.unlink()
        said = end_of(sweep)
    assert said.code == 0, said.text
    assert outcomes(tmp_path) == {"finished": 2}
    next_start(tmp_path)
    client, runs = store_of(tmp_path)
    assert len(runs) == 3, "the sweep, and its trials, those too that the lost database had"
    refuse_half_a_sweep(client, runs)


def test_a_store_that_cannot_be_made_is_a_fault_in_words(tmp_path: Path) -> None:
    (tmp_path / "mlruns").write_text("not a folder")
    store = Outbox(TrackingConfig(root=str(tmp_path / "mlruns")))
    assert store.open() is None
    assert str(tmp_path / "mlruns") in store.fault


def test_a_trial_is_nested_even_where_the_store_has_lost_its_sweep(tmp_path: Path, empty_store: Path) -> None:
    tracking = TrackingConfig(root=str(give_store(tmp_path, empty_store).parent))
    parent, owner = Record(name="the sweep", params={"axis.seed": "1,2"}), this_process()
    sweep = SweepFolder(tmp_path / "sweep")
    sweep.write(Plan(owner=owner, tracking=tracking, record=parent, conditions={}, trials=[]))
    sweep.mark_delivered("an id of the store that was lost", parent)
    trial = TrialFolder(sweep.path / "0000")
    trial.path.mkdir()
    record = Record(name="the trial", params={}, parent=parent.id, outcome=Outcome.finished.value)
    assert Outbox(tracking).deliver_trial(trial, record) is not None
    below = {run.info.run_name: run.data.tags.get("mlflow.parentRunId") for run in store_of(tmp_path)[1]}
    assert below["the trial"] is not None


class Looked(list[Path]):
    """Files; while the store takes them another start looks after orphans."""

    def __init__(self, look: Callable[[], object]) -> None:
        super().__init__()
        self._look = look

    def __iter__(self) -> Iterator[Path]:
        self._look()
        return super().__iter__()


def test_a_record_on_its_way_is_no_orphan_for_another_start(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "multirun").mkdir()
    tracking = TrackingConfig(root=str(give_store(tmp_path, empty_store).parent))
    dead = owner_tags(replace(this_process(), pid=DEAD), tmp_path / "its folder")
    record = Record(name="late", params={}, tags={**dead, "outcome": "finished"}, outcome="finished")
    other = Outbox(tracking)
    with FileLock(tmp_path / "multirun" / ".recovery.lock"):  # as the start has it that delivers for the dead
        open_tracker(tracking).deliver(record, Looked(lambda: recover(other)))
    [run] = store_of(tmp_path)[1]
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "finished")


def test_a_store_out_of_reach_is_asked_once_a_start_however_many_records_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(this_process(), pid=DEAD)
    for number in range(4):
        record = Record(name=f"trial {number}", params={}, tags={"device": "none"})
        asked = Manifest(owner=gone, t=0.0, tracking=TrackingConfig(), record=record)
        folder = TrialFolder(tmp_path / "multirun" / "today" / str(number))
        folder.begin(asked, TrialConfig(), {}, HostFacts())
        finish(folder, asked, End(outcome=Outcome.killed, reason=""), [], [], HostFacts())
    opened: list[TrackingConfig] = []

    def unreachable(tracking: TrackingConfig) -> Tracker:
        opened.append(tracking)
        raise TrackingFailed("each time this takes seconds")

    monkeypatch.setattr(outbox, "open_tracker", unreachable)
    monkeypatch.chdir(tmp_path)
    found = recover(Outbox(TrackingConfig()))
    assert found.waiting == 4
    assert len(opened) == 1


# --- several starts, and kills, while the store is made


@pytest.mark.nightly
def test_two_sweeps_and_two_trials_started_at_once_in_an_empty_folder(tmp_path: Path) -> None:
    commands = [TINY, ("-m", *TINY, "learning_rate=1e-4,2e-4"), (*TINY, "seed=2"), ("-m", *TINY, "batch_size=1,2")]
    with contextlib.ExitStack() as stack:
        own = {MIGRATED: "1"}
        said = [end_of(p) for p in [stack.enter_context(started(tmp_path, *command, **own)) for command in commands]]
    assert [one.code for one in said] == [0] * 4, "\n".join(one.text for one in said)
    client, runs = store_of(tmp_path)
    assert Counter(run.info.status for run in runs) == {"FINISHED": 8}
    parents = {run.info.run_id for run in runs if "points" in run.data.params}
    below = Counter(run.data.tags.get("mlflow.parentRunId", "none") for run in runs)
    assert below == {"none": 4, **dict.fromkeys(parents, 2)}
    for one in runs:
        if one.info.run_id not in parents:
            refuse_half_a_run(client, one)


def test_a_kill_while_the_very_first_store_is_made_leaves_a_folder_that_works(tmp_path: Path) -> None:
    for pattern, seconds in (("mlflow.db.lock", 0.0), ("tmp*/mlflow.db", 0.7)):
        before = set(tmp_path.glob(f"mlruns/{pattern}"))
        with started(tmp_path, *TINY, **{MIGRATED: "1"}) as trial:
            until(lambda b=before, p=pattern: set(tmp_path.glob(f"mlruns/{p}")) - b != set(), pattern)  # type: ignore[misc]
            time.sleep(seconds)
            trial.kill()
            trial.wait()
    said = run(tmp_path, *TINY)
    assert said.code == 0, said.text
    client, runs = store_of(tmp_path)
    refuse_half_a_run(client, max(runs, key=lambda one: one.info.start_time))
    assert not [one for one in runs if one.info.status == "RUNNING"]


def test_a_folder_that_another_sweep_has_is_refused_before_its_plan_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with FileLock(tmp_path / "mine" / ".sweep.lock"):
        said = run(tmp_path, *SWEEP, "hydra.sweep.dir=mine", "tracking=none")
    assert (said.code, "runs a sweep" in said.err, "Traceback" in said.text) == (2, True, False), said.text


def test_a_refused_sweep_takes_nothing_away_from_a_folder_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    said = run(tmp_path, *SWEEP, "hydra.sweep.dir=mine", "tracking=none", "optimizer.optim=adam_typo")
    assert (said.code, "adam_typo" in said.err) == (2, True), said.text
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.nightly
def test_a_sweep_in_a_folder_of_the_users_choice_is_taken_up_as_any_other(tmp_path: Path, empty_store: Path) -> None:
    give_store(tmp_path, empty_store)
    own = (*SWEEP, "hydra.sweep.dir=elsewhere/mine")
    with started(tmp_path, *own) as sweep:
        until(lambda: steps_in(tmp_path, "elsewhere/mine/*") > 0, "a step")
        sweep.kill()
        sweep.wait()
    again = run(tmp_path, *own, "resume=true")
    assert again.code == 0, again.text
    client, runs = store_of(tmp_path)
    refuse_half_a_sweep(client, [run for run in runs if run.info.status == "FINISHED"])
    attempts = count(tmp_path, "elsewhere/mine/*/trial.json")
    assert Counter(run.info.status for run in runs) == Counter({"FINISHED": 3, "KILLED": attempts - 2})
    assert count(tmp_path, "elsewhere/mine/*/record.json") == attempts


# --- what killed processes leave


@dataclass(frozen=True)
class Left:
    """A folder full of what killed processes and broken disks leave, and the two next starts, made at once."""

    folder: Path
    trial: Said
    sweep: Said
    runs: dict[str, Run]
    """Each run of the store, by the id of its record; those made here by their name."""

    def of(self, name: str) -> Run:
        """The run of the trial whose folder has this name."""
        asked = json.loads((self.folder / "multirun" / "2026-01-01" / name / "trial.json").read_text())
        return self.runs[asked["record"]["id"]]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Left:
    folder = tmp_path_factory.mktemp("left")
    give_store(folder, empty_store)
    day = folder / "multirun" / "2026-01-01"
    assert run(folder, *TINY, "hydra.run.dir=multirun/2026-01-01/finished").code == 0
    long = (*TINY, "measure.steps=100000", "hydra.run.dir=multirun/2026-01-01/killed")
    with started(folder, *long) as parent:
        until(lambda: steps_in(folder, "multirun/*/killed") > 3, "three steps")
        parent.kill()
    _pretend_there_was_a_card(day / "killed")
    _copy(day / "finished", day / "unrecorded", "record.json", "summary.json")
    _copy(day / "finished", day / "undelivered")
    _copy(day / "finished", day / "torn", "record.json", "summary.json")
    torn = day / "torn" / "events.jsonl"
    torn.write_text(torn.read_text()[:-40])
    _damage(day)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    _leave_orphans(client)
    with started(folder, *TINY) as trial, started(folder, "-m", *TINY, "batch_size=1,2", "resume=true") as sweep:
        said = end_of(trial), end_of(sweep)
    runs = {run.data.tags.get("record_id", run.info.run_name): run for run in store_of(folder)[1]}
    return Left(folder, *said, runs)


def _copy(source: Path, target: Path, *without: str) -> None:
    """Another trial of a process that is gone, in no store."""
    shutil.copytree(source, target)
    for name in ("delivered.json", *without):
        (target / name).unlink()
    new = uuid.uuid4().hex
    for path in (target / "trial.json", target / "record.json"):
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        if path.name == "trial.json":
            found["owner"]["pid"] = DEAD
        found.get("record", found)["id"] = new
        path.write_text(json.dumps(found))


def _pretend_there_was_a_card(folder: Path) -> None:
    last = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])["t"]
    with (folder / "samples.jsonl").open("a") as file:
        for number in range(3):
            reading = Sample(t=last + number, average_watts=70.0 + number, used_bytes=2**30, temperature_celsius=40.0)
            file.write(reading.encode() + "\n")
        file.write('{"t": 12')


def _damage(day: Path) -> None:
    """Files as a broken disk or another version leaves them."""
    for name, content in {"empty": "", "garbage": "\0\0}{", "list": "[1]", "number": "7", "dictionary": "{}"}.items():
        for file in ("sweep.json", "trial.json", "summary.json", "record.json"):
            folder = day / f"{name} {file}"
            shutil.copytree(day / "undelivered", folder, ignore=shutil.ignore_patterns("adapter", "trial.json"))
            (folder / file).write_text(content)


def _leave_orphans(client: MlflowClient) -> None:
    here = this_process()
    owners = {
        "dead": replace(here, pid=DEAD),
        "of an earlier boot": replace(here, boot_id="0" * 36),
        "of a pid given out again": replace(here, started=here.started - 1),
        "alive": here,
        "elsewhere": replace(here, host="elsewhere", pid=DEAD),
    }
    experiment = client.get_experiment_by_name("lora_lab").experiment_id
    for name, owner in owners.items():
        client.create_run(experiment, tags=owner_tags(owner, Path("/gone")), run_name=name)


@pytest.mark.nightly
def test_the_next_trial_runs_whatever_is_left(left: Left) -> None:
    assert (left.trial.code, "Traceback" in left.trial.text) == (0, False), left.trial.text


@pytest.mark.nightly
def test_the_next_sweep_runs_whatever_is_left(left: Left) -> None:
    assert (left.sweep.code, "Traceback" in left.sweep.text) == (0, False), left.sweep.text


@pytest.mark.nightly
def test_two_next_starts_at_once_deliver_everything_once(left: Left) -> None:
    ids = Counter(run.data.tags.get("record_id") for run in store_of(left.folder)[1])
    assert [number for record, number in ids.items() if record] == [1] * (len(ids) - 1)
    assert late(left.trial) + late(left.sweep) >= 4


def test_a_run_of_a_dead_process_is_ended_and_that_of_a_living_or_distant_one_is_not(left: Left) -> None:
    found = {name: left.runs[name].info.status for name in left.runs if len(name) < 30}
    assert found == {
        "dead": "KILLED",
        "of an earlier boot": "KILLED",
        "of a pid given out again": "KILLED",
        "alive": "RUNNING",
        "elsewhere": "RUNNING",
    }
    assert left.runs["dead"].data.tags["outcome"] == "killed"


def test_a_trial_whose_parent_was_killed_in_its_window_is_recorded_as_killed_with_what_it_had(left: Left) -> None:
    run = left.of("killed")
    assert (run.info.status, run.data.tags["outcome"], run.data.tags["phase"]) == ("KILLED", "killed", "window")
    assert "the process that ran lora_lab was gone" in run.data.tags["reason"]
    client, _ = store_of(left.folder)
    folder = left.folder / "multirun" / "2026-01-01" / "killed"
    said = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if line.endswith("}")]
    losses = [event["loss"] for event in said if event["event"] == "Step"]
    kept = sorted(client.get_metric_history(run.info.run_id, "Steps/loss"), key=lambda point: point.step)
    assert [point.value for point in kept] == losses
    assert [p.value for p in client.get_metric_history(run.info.run_id, "system/gpu_0_power_usage_watts")] == [
        70.0,
        71.0,
        72.0,
    ]
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "environment.json", "events.jsonl", "samples.jsonl", "summary.json", "trial.json"} <= names


def test_a_trial_that_had_ended_before_its_parent_was_killed_is_finished(left: Left) -> None:
    refuse_half_a_run(store_of(left.folder)[0], left.of("unrecorded"))
    folder = left.folder / "multirun" / "2026-01-01"
    made, before = (json.loads((folder / name / "record.json").read_text()) for name in ("unrecorded", "finished"))
    assert made["series"] == before["series"]
    assert made["metrics"] == before["metrics"]


def test_a_record_that_no_store_had_is_delivered(left: Left) -> None:
    refuse_half_a_run(store_of(left.folder)[0], left.of("undelivered"))


def test_a_torn_last_line_leaves_the_lines_before_it(left: Left) -> None:
    run = left.of("torn")
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed")
    client, _ = store_of(left.folder)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "Steps/loss")] == [1, 2]
