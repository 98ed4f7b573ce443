"""A sweep with cluster=slurm through the real command line, submitit and a stand-in for Slurm's commands, whose jobs
are processes of this machine: each trial ends once on disk and in the store, whoever dies meanwhile."""

import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clusters import FAST, ON_CPU, RATES, SWEEP, end_nodes, fork_jobs, in_step_2, node_of, outcomes, release, waiting
from conftest import FAKES, Said, Server, lab_in, records_in, started, until
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from benchmarks.queued_trials import Asked, run
from lora_lab.composition.places import cluster_faults
from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.options import ClusterKind, Isolation, PlacementKind, Plan, TrackingKind
from lora_lab.places_config import ClusterConfig, PlacementConfig
from lora_lab.store.mlflow_names import read_back
from lora_lab.sweep.cluster import slurm as slurm_module
from lora_lab.sweep.cluster.node import take, taken_by

ON_SLURM = (*SWEEP, "cluster=slurm")


@pytest.fixture(scope="module", autouse=True)
def _jobs_are_forked() -> None:
    fork_jobs()


Cluster = Callable[..., dict[str, str]]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Cluster]:
    """`slurm(*rates)` returns the variables of a command that has a Slurm cluster, whose workers of these rates wait.
    No job outlives the test."""

    def variables(*rates: str) -> dict[str, str]:
        path = os.pathsep.join([str(FAKES / "slurm"), os.environ["PATH"]])
        return {**waiting(tmp_path, *rates), "PATH": path, "FAKE_SLURM": str(tmp_path / "slurm")}

    yield variables
    release(tmp_path)
    end_nodes(tmp_path)
    for path in tmp_path.glob("slurm/*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


def runs_of(uri: str) -> list[tuple[Run, dict[str, str]]]:
    """The runs of trials in a store, with the tags of their records."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lora_lab")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    read = [(run, read_back(run.data.params, run.data.tags, run.data.metrics)[1]) for run in runs]
    return [(run, tags) for run, tags in read if "mlflow.parentRunId" in run.data.tags]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("tracking") / "server") as running:
        yield running


@pytest.mark.nightly
def test_each_trial_is_a_job_and_runs_again_when_its_node_is_lost(
    tmp_path: Path, server: Server, slurm: Cluster
) -> None:
    command, variables = (*ON_SLURM, "tracking=server", f"tracking.uri={server.uri}"), slurm(*RATES)
    with started(tmp_path, *command, **variables) as sweep:
        until(lambda: len(in_step_2(tmp_path)) == 2, "two trials run")
        assert len(list((tmp_path / "slurm").glob("*/script"))) == 3, "a look at a node, and two trials at a time"
        os.kill(node_of(tmp_path, "0000"), signal.SIGKILL)
        os.kill(node_of(tmp_path, "0001"), signal.SIGTERM)  # as Slurm takes a node back
        until(lambda: {"0000-2", "0001-2"} <= in_step_2(tmp_path), "both run on other nodes")
        release(tmp_path)
        assert sweep.wait(120) == 0, sweep.communicate()[0]
    assert outcomes(tmp_path) == {"killed": 2, "finished": 3}
    for record in records_in(tmp_path):
        assert record["tags"]["cluster"] == "slurm"
        assert "cluster" not in record["tags"]["command"], "the command runs this trial alone, on this machine"
    runs = runs_of(server.uri)
    ended = Counter((tags["trial"], run.info.status) for run, tags in runs)
    assert ended == {("0", "KILLED"): 1, ("1", "KILLED"): 1, **{(trial, "FINISHED"): 1 for trial in "012"}}
    again = lab_in(tmp_path)(*command, "resume=true", **variables)
    assert (again.code, "nothing left to run" in again.out) == (0, True), again.text
    assert len(runs_of(server.uri)) == len(runs)


def test_what_still_runs_when_a_lost_sweep_is_resumed_is_not_run_twice(tmp_path: Path, slurm: Cluster) -> None:
    variables = slurm(RATES[0])
    command = (*ON_SLURM, "tracking=none")
    with started(tmp_path, *command, **variables) as sweep:
        until(lambda: outcomes(tmp_path)["finished"] == 2 and len(in_step_2(tmp_path)) == 3, "the last waits")
        sweep.kill()
        sweep.wait(30)
    assert outcomes(tmp_path) == {"finished": 2}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    here = lab_in(tmp_path)(*SWEEP[:-1], "tracking=none", "resume=true", **variables)
    refused(here, "slurm ", "cluster=slurm")
    with started(tmp_path, *command, "resume=true", **variables) as sweep:
        until(lambda: len(list((tmp_path / "slurm").glob("*/script"))) == 5, "it has asked a node")
        release(tmp_path)
        assert sweep.wait(120) == 0, sweep.communicate()[0]
    assert outcomes(tmp_path) == {"finished": 3}
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


@pytest.mark.nightly
def test_a_job_that_waits_for_a_node_is_taken_back_by_resume(tmp_path: Path, slurm: Cluster) -> None:
    variables, command = slurm(), (*ON_SLURM, "tracking=none", "cluster.workers=3")
    with started(tmp_path, *command, **variables) as sweep:
        until(lambda: (tmp_path / "slurm" / "1" / "code").exists(), "a node has answered")
        (tmp_path / "slurm" / "full").touch()
        until(lambda: len(list((tmp_path / "slurm").glob("*/script"))) == 4, "all are submitted")
        sweep.kill()
        sweep.wait(30)
    (tmp_path / "slurm" / "full").unlink()
    said = lab_in(tmp_path)(*command, "resume=true", **variables)
    assert said.code == 0, said.text
    assert outcomes(tmp_path) == {"finished": 3}


@pytest.mark.nightly
def test_ctrl_c_ends_what_runs_and_takes_back_what_waits(tmp_path: Path, slurm: Cluster) -> None:
    variables = slurm(*RATES)
    with started(tmp_path, *ON_SLURM, "tracking=none", **variables) as sweep:
        until(lambda: len(in_step_2(tmp_path)) == 2, "two trials run")
        os.kill(sweep.pid, signal.SIGINT)
        assert sweep.wait(60) == 130
    assert [record["tags"]["reason"] for record in records_in(tmp_path)] == ["ended by the cluster (slurm)"] * 2


@pytest.mark.parametrize(
    ("trials", "nodes", "seconds", "kills"),
    [(12, 4, 0.3, 0.5), pytest.param(1000, 50, 15.0, 0.15, marks=[pytest.mark.nightly, pytest.mark.timeout(5400)])],
)
def test_no_trial_is_lost_or_doubled_while_nodes_are_killed(
    tmp_path: Path, server: Server, trials: int, nodes: int, seconds: float, kills: float
) -> None:
    def start(words: list[str], folder: Path, variables: dict[str, str]) -> int:
        at_its_end = {"QUICK_DIES": "0003"}  # it has told its end, and its record is not written yet
        with started(folder, *words, **variables, **at_its_end) as sweep:
            said = sweep.communicate(5000)[0]
            assert sweep.wait() == 0, said
        return 0

    asked = Asked(trials=trials, nodes=nodes, seconds=seconds, kills=kills, seed=trials)
    found, killed = run(asked, tmp_path / f"of_{trials}", server.uri, start)
    assert (found.lost, found.doubled, found.apart) == ([], [], [])
    assert found.outcomes["finished"] == found.trials == trials
    assert killed.total() > 0


@pytest.mark.nightly
def test_an_attempt_that_slurm_starts_again_or_that_outlives_its_job_counts_once(
    tmp_path: Path, slurm: Cluster
) -> None:
    variables, state = slurm(*RATES), tmp_path / "slurm"
    with started(tmp_path, *ON_SLURM, "tracking=none", **variables) as sweep:
        until(lambda: len(in_step_2(tmp_path)) == 2, "two trials run")
        assert "--no-requeue" in (state / "2" / "script").read_text()
        (state / "requeue").touch()  # on a site that does so all the same
        os.kill(node_of(tmp_path, "0000"), signal.SIGKILL)
        until(lambda: "0000-2" in in_step_2(tmp_path), "it runs again, in a folder of its own")
        assert not (state / "requeue").exists(), "the first job was started again too"
        (state / "3" / "pid").unlink()  # Slurm does not reach the node any more
        (state / "3" / "code").write_text("1")
        until(lambda: "0001-2" in in_step_2(tmp_path), "the other runs on a node that Slurm reaches")
        [given_up] = tmp_path.glob("multirun/*/*/0001/record.json")
        before = given_up.read_bytes()
        release(tmp_path)
        assert sweep.wait(120) == 0, sweep.communicate()[0]
        until(lambda: node_is_gone(tmp_path, "0001"), "the node that was given up has ended as well")
    assert given_up.read_bytes() == before
    assert outcomes(tmp_path) == {"killed": 2, "finished": 3}


def node_is_gone(folder: Path, attempt: str) -> bool:
    return not Path(f"/proc/{node_of(folder, attempt)}").exists()


def refused(said: Said, *words: str) -> None:
    assert said.code == 2, said.text
    assert [word for word in words if word not in said.err] == [], said.err
    assert "Traceback" not in said.err


def test_a_node_that_does_not_see_the_folder_is_refused_before_the_sweep(tmp_path: Path, slurm: Cluster) -> None:
    variables = slurm()
    blind = tmp_path / "blind"
    shutil.copytree(FAKES / "slurm", blind, symlinks=True)
    (blind / "srun").unlink()
    (blind / "srun").write_text("#!/bin/sh\nexit 1\n")  # whose files are not seen there
    (blind / "srun").chmod(0o755)
    variables["PATH"] = os.pathsep.join([str(blind), os.environ["PATH"]])
    refused(lab_in(tmp_path)(*ON_SLURM, "tracking=none", **variables), "slurm 1", str(tmp_path), "share")
    assert not list(tmp_path.rglob("sweep.json"))


def test_without_slurm_or_without_a_sweep_it_is_refused(tmp_path: Path) -> None:
    refused(lab_in(tmp_path)(*ON_SLURM, "tracking=none", PATH=str(tmp_path)), "sbatch", "login node")
    refused(lab_in(tmp_path)(*FAST, *ON_CPU, "cluster=slurm", "tracking=none"), "cluster=slurm", "-m")
    assert not list(tmp_path.rglob("trial.json"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tracking": TrackingConfig()}, ["tracking=server", "tracking=none"]),
        ({"placement": PlacementConfig(kind=PlacementKind.each_gpu)}, ["placement=each_gpu"]),
        ({"device": "gpu:1"}, ["device=gpu:1"]),
        ({"repeats": "auto"}, ["repeats=auto"]),
        ({"plan": Plan.fits}, ["plan=fits"]),
        ({"isolation": Isolation.inline}, ["isolation=inline"]),
        ({"cluster": ClusterConfig(partition="a100")}, ["cluster.partition=a100", "cluster=slurm"]),
        (
            {"cluster": ClusterConfig(kind=ClusterKind.slurm, address="10.0.0.1:6379")},
            ["cluster.address=10.0.0.1:6379"],
        ),
        ({"cluster": ClusterConfig(kind=ClusterKind.ray)}, ["cluster.address="]),
    ],
)
def test_settings_that_no_cluster_takes_are_faults(changes: dict[str, Any], words: list[str]) -> None:
    config = TrialConfig(cluster=ClusterConfig(kind=ClusterKind.slurm), tracking=TrackingConfig(kind=TrackingKind.none))
    assert cluster_faults(config) == []
    [fault] = cluster_faults(replace(config, **changes))
    assert [word for word in words if word not in fault] == [], fault


def test_one_process_gets_a_ticket(tmp_path: Path) -> None:
    ticket = tmp_path / "0000.ticket"
    assert taken_by(ticket) is None
    assert [take(ticket), take(ticket)] == [True, False]
    owner = taken_by(ticket)
    assert owner is not None
    assert owner.pid == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [ticket.name]


def test_where_slurm_keeps_no_accounts_its_queue_says_what_is_over(
    tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_module, "_ASK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(slurm_module, "_VISIBLE_SECONDS", -1.0)
    state = tmp_path / "slurm"
    for number in (7, 8):
        (state / f"{number}").mkdir(parents=True)
    (state / "no accounts").touch()
    engine = slurm_module.Slurm(ClusterConfig(kind=ClusterKind.slurm), False, tmp_path / "jobs")
    assert [engine.is_over(f"slurm {number}") for number in (7, 8)] == [False, False]
    (state / "7" / "code").write_text("1")  # it has ended, and is not shown any more
    assert engine.is_over("slurm 7")
    assert not engine.is_over("slurm 8")
    assert engine.is_over("slurm 9"), "long ago, so that the controller has forgotten it"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not engine.is_over("slurm 8"), "nothing is known while nobody answers"


def test_the_accounts_say_what_is_over(tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_module, "_ASK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(slurm_module, "_VISIBLE_SECONDS", -1.0)
    states = ("PREEMPTED", "CANCELLED by 1000", "NODE_FAIL", "OUT_OF_MEMORY", "SUSPENDED", "REQUEUED", "RUNNING")
    for number, state in enumerate(states, 1):
        (tmp_path / "slurm" / f"{number}").mkdir(parents=True)
        (tmp_path / "slurm" / f"{number}" / "state").write_text(state)
    engine = slurm_module.Slurm(ClusterConfig(kind=ClusterKind.slurm), False, tmp_path / "jobs")
    assert [engine.is_over(f"slurm {number}") for number in range(1, 8)] == [True] * 4 + [False] * 3
