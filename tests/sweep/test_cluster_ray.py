"""A sweep with cluster=ray on a Ray cluster of this machine alone. Ray is no dependency of the tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from clusters import FAST, ON_CPU, RATES, SWEEP, end_nodes, in_step_2, node_of, outcomes, release, waiting
from conftest import lab_in, started, until

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture
def head(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of one machine, on whose nodes the workers wait."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={tmp_path_factory.getbasetemp()}/ray"]
    what = ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *where, *what],
        env={**os.environ, **waiting(tmp_path, *RATES)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Ray runtime started" in line:
            break
    yield f"127.0.0.1:{port}"
    release(tmp_path)
    end_nodes(tmp_path)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@needs_ray
def test_each_trial_is_a_task_and_runs_again_when_its_node_is_lost(tmp_path: Path, head: str) -> None:
    command = (*SWEEP, "cluster=ray", f"cluster.address={head}", "tracking=none")
    with started(tmp_path, *command) as sweep:
        until(lambda: len(in_step_2(tmp_path)) == 2, "two trials run")
        os.kill(node_of(tmp_path, "0000"), signal.SIGKILL)
        until(lambda: "0000-2" in in_step_2(tmp_path), "the trial runs again")
        release(tmp_path)
        assert sweep.wait(120) == 0, sweep.communicate()[0]
    assert outcomes(tmp_path) == {"killed": 1, "finished": 3}


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("192.0.2.1:6379", "RAY_AUTH_MODE=token"),
        ("127.0.0.1:1", "127.0.0.1:1"),  # where nobody listens
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_an_address_without_a_cluster_or_authentication_is_refused(tmp_path: Path, address: str, word: str) -> None:
    said = lab_in(tmp_path)("-m", *FAST, *ON_CPU, "cluster=ray", f"cluster.address={address}", "tracking=none")
    assert said.code == 2, said.text
    assert word in said.err
    assert "Traceback" not in said.err
    assert not list(tmp_path.rglob("trial.json"))
