"""The real command line in a process of its own, as a user has it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from lora_lab.compose import CONF
from lora_lab.config import ModelConfig, ModelSource, Weights
from lora_lab.worker.models import load_architecture

# a shared machine stalls now and then; no example is wrong for being slow
settings.register_profile("lora_lab", deadline=None)
settings.load_profile("lora_lab")

SECONDS = 300


@dataclass(frozen=True)
class Said:
    """What a command said and how it left."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


Lab = Callable[..., Said]


def lab_in(folder: Path) -> Lab:
    """`lab("model=tiny", ...)` runs `python -m lora_lab model=tiny ...` in `folder`, without any hub."""

    def run(*arguments: str, cwd: Path = folder, **environment: str) -> Said:
        done = subprocess.run(
            [sys.executable, "-m", "lora_lab", *arguments],
            cwd=cwd,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """The command line in an empty folder."""
    return lab_in(tmp_path)


def records_in(folder: Path) -> list[dict[str, Any]]:
    """What each trial run in `folder` left on disk."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("multirun/**/record.json"))]


def record_of(folder: Path) -> dict[str, Any]:
    """What the only trial run in `folder` left on disk."""
    [record] = records_in(folder)
    return record


def store_of(folder: Path) -> tuple[MlflowClient, list[Run]]:
    """The MLflow store made in `folder`, and its runs."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("lora_lab")
    if experiment is None:
        return client, []
    return client, list(client.search_runs([experiment.experiment_id]))


def save_tiny(folder: Path) -> None:
    """A small model with random weights and its tokenizer, as save_pretrained leaves them."""
    from transformers import AutoModelForCausalLM

    from lora_lab.worker.tiny_tokenizer import tiny_tokenizer

    shapes = yaml.safe_load((CONF / "model" / "tiny.yaml").read_text())["architecture"]
    config = load_architecture(ModelConfig(source=ModelSource.tiny, weights=Weights.random, architecture=shapes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """A real tracking server on loopback; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "server"
    home.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{home}/server.db",
        "--artifacts-destination",
        str(home / "artifacts"),
    ]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=home, env=quiet, stdout=log, stderr=log, start_new_session=True)
    try:
        uri = f"http://127.0.0.1:{port}"
        until(lambda: _answers(f"{uri}/health"), "the tracking server answers", seconds=90)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
        return True
    return False


def until(happened: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait until something is seen."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not seen within {seconds:.0f} s: {what}"
        time.sleep(0.1)
