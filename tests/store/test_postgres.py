"""A sweep from three nodes into MLflow on Postgres, which services/start has started. Both are skipped where they are
not installed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from clusters import fork_jobs
from conftest import as_recorded, records_in, started, until
from mlflow.tracking import MlflowClient

from benchmarks.queued_trials import EXPERIMENT, Asked, run

START = Path(__file__).parents[2] / "services" / "start"

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")), reason="Postgres is not installed"),
    pytest.mark.skipif(find_spec("psycopg") is None, reason="psycopg is not installed (the extra postgres)"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Services:
    """What services/start starts, which keeps its files when it ends."""

    def __init__(self) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))  # which the user postgres may enter
        self.port, self.database_port = free_port(), free_port()

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        variables = {"STATE": str(self.state), "PORT": str(self.port), "PGPORT": str(self.database_port)}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with (self.state / "printed").open("ab") as printed:
            command = subprocess.Popen(
                [START],
                env={**os.environ, **variables, "PATH": path},
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
        try:
            until(lambda: answers(self.port) or command.poll() is not None, "the server answers", seconds=240)
            assert command.poll() is None, (self.state / "printed").read_text()
            yield f"http://127.0.0.1:{self.port}"
        finally:
            os.killpg(command.pid, signal.SIGINT)
            command.wait(60)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.fixture
def services() -> Iterator[Services]:
    there = Services()
    yield there
    shutil.rmtree(there.state)


def test_a_sweep_from_three_nodes_is_in_postgres_as_in_its_folders(tmp_path: Path, services: Services) -> None:
    fork_jobs()

    def start(words: list[str], folder: Path, variables: dict[str, str]) -> int:
        with started(folder, *words, **variables) as sweep:
            said = sweep.communicate()[0]
            assert sweep.wait() == 0, said
        return 0

    folder = tmp_path / "three_nodes"
    with services.running() as uri:
        found, _ = run(Asked(trials=6, nodes=3, seconds=1.0, kills=0.0), folder, uri, start)
        assert (found.lost, found.doubled, found.apart, found.attempts) == ([], [], [], 6)
        nothing_is_open(services)
    with services.running() as uri:  # once more, on the tables and files that are there
        client = MlflowClient(tracking_uri=uri)
        [experiment] = [each for each in client.search_experiments() if each.name == EXPERIMENT]
        runs = {run.data.tags["record_id"]: run for run in client.search_runs([experiment.experiment_id])}
        records = records_in(folder)
        assert len(runs) == 1 + len(records) == 7
        for record in records:
            recorded = as_recorded(runs[record["id"]])
            assert recorded.data.metrics.items() >= record["metrics"].items()  # a series has its last value there too
            assert recorded.data.params.items() >= record["params"].items()
            assert {"config.yaml", "events.jsonl"} <= {
                file.path for file in client.list_artifacts(recorded.info.run_id)
            }
    assert not answers(services.database_port), "it ends with the server"


def nothing_is_open(services: Services) -> None:
    """Others reach neither the server nor the database, and see no password."""
    ports = {services.port, services.database_port}
    listen = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr.port in ports]
    assert {(each.laddr.ip, each.laddr.port) for each in listen} == {("127.0.0.1", port) for port in ports}
    password = (services.state / "password").read_text().strip()
    assert len(password) > 20
    assert password not in (services.state / "printed").read_text()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert password not in " ".join([*process.cmdline(), *process.environ().values()])
    modes = {name: (services.state / name).stat().st_mode & 0o077 for name in ("password", "pgpass", "postgres")}
    assert set(modes.values()) == {0}, modes
