"""The command line as a user has it, and what tests look at afterwards.

What is heavy is imported where it is used: a file of pure tests starts within a second.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_server import ADDRESS, CommandServer, Running
from hypothesis import settings
from quick_stores import copy_tables, leave_stores_unsynced

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

# a shared machine stalls now and then; no example is wrong for being slow
settings.register_profile("push", deadline=None, max_examples=50)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile("push")

SECONDS = 300

FAKES = Path(__file__).parent / "fakes"

SERVER = CommandServer()

LONG = (
    "test_trial.py",
    "test_live_step.py",
    "test_sweep.py",
    "test_cotrain.py",
    "test_job.py",
    "test_data_parallel.py",
    "test_estimate.py",
    "test_low_memory_optimizers.py",
    "test_callback.py",
    "test_halving_sweep.py",
    "test_variants.py",
    "test_cross.py",
    "test_outbox.py",
    "test_engine_compile.py",
    "test_job_kills.py",
    "test_side_by_side.py",
    "test_cluster.py",
    "test_sharded_trial.py",
    "test_sweep_faults.py",
    "test_refused_input.py",
    "test_conf.py",
    "test_arguments.py",
    "test_engine_graph_step.py",
    "test_engine_fused_lora_groups.py",
    "test_kills.py",
    "test_faults.py",
    "test_hub.py",
    "test_command_server.py",
    "test_peers.py",
)
"""Files that take longest. They begin first, so that no worker is left with one when the others have ended."""

ON_FEW_CORES = {
    "OMP_NUM_THREADS": "1",  # two threads a core wait for each other longer than they calculate
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more are processes that import torch first
    "TORCHINDUCTOR_VEC_ISA_OK": "0",  # g++ takes longer where it makes vectors, as users have them and nightly tests
}
"""What makes tests quick on two cores."""

KILLS = pytest.StashKey[dict[str, Counter[str]]]()
"""What the rounds of test_kills.py hit."""


def with_fakes() -> str:
    """Return a PYTHONPATH that begins with the fakes."""
    return os.pathsep.join(filter(None, [str(FAKES), os.environ.get("PYTHONPATH")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="at how many instants sweeps and jobs are killed")
    parser.addoption("--nightly", action="store_true", help="also run what is marked nightly")
    parser.addoption("--full-cross", action="store_true", help="test_cross.py runs all possible combinations")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell does to what it starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[KILLS] = {"phases": Counter(), "rounds": Counter()}
    config.addinivalue_line("markers", "nightly: takes long for what it adds to other tests")
    config.addinivalue_line("markers", "mounts: needs a small file system; runs in a namespace where it must")
    if config.option.markexpr != "gpu":
        for name, value in ON_FEW_CORES.items():
            os.environ.setdefault(name, value)
    if hasattr(config, "workerinput"):  # one of several of pytest-xdist's
        # trials queue for a device by a lock in the temporary folder: those of another worker are not to be waited for
        tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix=f"{config.workerinput['workerid']}-")
    SERVER.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    if getattr(config.option, "numprocesses", None):  # this process starts those of pytest-xdist
        SERVER.share()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--nightly"):
        items[:] = [item for item in items if item.get_closest_marker("nightly") is None]
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    if "sqlalchemy" in sys.modules:  # a file was collected that uses stores in this process
        leave_stores_unsynced()
        copy_tables()


def pytest_unconfigure(config: pytest.Config) -> None:
    SERVER.stop()
    if hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        counted = session.config.stash[KILLS].items()
        session.config.workeroutput["kills"] = {name: dict(counts) for name, counts in counted}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist's counted."""
    for name, counts in getattr(node, "workeroutput", {}).get("kills", {}).items():
        node.config.stash[KILLS][name].update(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line about the kills, whether they were survived or not."""
    phases, rounds = terminalreporter.config.stash[KILLS].values()
    if not phases:
        return
    reports = [r for kind in ("failed", "error") for r in terminalreporter.stats.get(kind, ())]
    failures = len({report.nodeid for report in reports if "test_kills.py" in report.nodeid})
    hit = ", ".join(f"{count} {phase}" for phase, count in phases.most_common())
    terminalreporter.write_line(
        f"kills: {phases.total()} instants ({hit}); {rounds['attempts']} attempts at trials; {failures} failures"
    )


def _cannot_compile() -> bool:
    from lora_lab.trial.devices import folder_with_a_space, missing_to_compile

    return folder_with_a_space() is not None or bool(missing_to_compile(on_card=False))


compiles = pytest.mark.skipif(
    _cannot_compile(),
    reason="torch can't compile for a CPU without g++ and Python.h, or where there is a space in its folder",
)
"""For tests that compile in earnest."""


def some_by_day(cases: Iterable[Any], by_day: Sequence[Any]) -> list[Any]:
    """The cases of a parametrised test: those of `by_day` run on each push, the others by night."""
    cases = list(cases)
    assert all(case in cases for case in by_day)
    values = [(case if isinstance(case, tuple) else (case,), case in by_day) for case in cases]
    return [pytest.param(*case, marks=[] if day else [pytest.mark.nightly]) for case, day in values]


@pytest.fixture
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch.compile trace, guard and differentiate as ever, but call the traced operations: machine code for the
    CPU, which takes g++ a second a kernel, is made by night."""
    import functools

    import torch

    from lora_lab.worker.engines import dequantize

    if not request.config.getoption("--nightly"):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        monkeypatch.setattr(dequantize, "_compiled_dequantize", torch.compile(dequantize.dequantize, dynamic=False))


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


def lab_in(folder: Path, module: str = "lora_lab", real: bool = False) -> Lab:
    """`lab("model=tiny", ...)` runs `python -m lora_lab model=tiny ...` in `folder`, without any hub.

    Args:
        real: in an interpreter of its own, where the test is about the start, the processes or the imports. So is a
            command with variables of its own, as libraries read some of them while being imported.
    """

    def run(*arguments: str, cwd: Path = folder, **environment: str) -> Said:
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment}
        if not real and SERVER.serves(environment):
            return Said(*SERVER.run(module, arguments, cwd, variables, SECONDS))
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=cwd,
            env=variables,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    return run


@contextlib.contextmanager
def started(folder: Path, *arguments: str, **environment: str) -> Iterator[Running]:
    """`python -m lora_lab arguments` in `folder` while it runs; it and its workers are gone afterwards."""
    process = SERVER.start("lora_lab", arguments, folder, {**SERVER.environment, **environment})
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """The command line in an empty folder."""
    return lab_in(tmp_path)


@pytest.fixture
def real_lab(tmp_path: Path) -> Lab:
    """The same, each command in an interpreter of its own."""
    return lab_in(tmp_path, real=True)


def records_in(folder: Path) -> list[dict[str, Any]]:
    """What each trial run in `folder` left on disk."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("multirun/**/record.json"))]


def record_of(folder: Path) -> dict[str, Any]:
    """What the only trial run in `folder` left on disk."""
    [record] = records_in(folder)
    return record


def store_of(folder: Path) -> "tuple[MlflowClient, list[Run]]":
    """The MLflow store made in `folder`, and its runs by the names that their records have."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("lora_lab")
    if experiment is None:
        return client, []
    return client, [as_recorded(run) for run in client.search_runs([experiment.experiment_id])]


def as_recorded(run: "Run") -> "Run":
    """A run by the names that its record has."""
    from mlflow.entities import Metric, Param, Run, RunData, RunTag

    from lora_lab.store.mlflow_names import read_back

    params, tags, metrics = read_back(run.data.params, run.data.tags, run.data.metrics)
    data = RunData(
        [Metric(key, value, 0, 0) for key, value in metrics.items()],
        [Param(key, text) for key, text in params.items()],
        [RunTag(key, text) for key, text in tags.items()],
    )
    return Run(run.info, data)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables and nothing in them: making one takes a third of a start."""
    from lora_lab.config import TrackingConfig
    from lora_lab.store.mlflow_store import open_tracker

    root = tmp_path_factory.mktemp("store")
    open_tracker(TrackingConfig(root=str(root)))
    return root / "mlflow.db"


def give_store(folder: Path, empty_store: Path) -> Path:
    """Put an empty store where a start in `folder` looks for one; its database."""
    (folder / "mlruns").mkdir()
    return Path(shutil.copy(empty_store, folder / "mlruns"))


class SmallDisk:
    """A file system of a size, which can be filled."""

    def __init__(self, path: Path, size: str) -> None:
        self.path = path
        self._size = size

    def __enter__(self) -> "SmallDisk":
        self.path.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self.path))
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def fill(self, leave: int = 0) -> None:
        """Take all room but `leave` bytes."""
        with (self.path / ".filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        size = (self.path / ".filler").stat().st_size
        os.truncate(self.path / ".filler", max(0, size - leave))

    def empty(self) -> None:
        """Give the room back."""
        (self.path / ".filler").unlink()

    def resize(self, size: str) -> None:
        _mount("-o", f"remount,size={size}", str(self.path))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, timeout=30)


def _may_mount(folder: Path) -> bool:
    with contextlib.suppress(subprocess.SubprocessError, OSError), SmallDisk(folder / "probe", "64k"):
        return True
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that mounts, where that is not allowed: the same in a namespace of its own."""
    if pyfuncitem.get_closest_marker("mounts") is None or _may_mount(pyfuncitem.funcargs["tmp_path"]):
        return None
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("neither mounting nor a user namespace is allowed here")
    again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    own = f"--basetemp={pyfuncitem.funcargs['tmp_path']}/again"
    done = subprocess.run(
        ["unshare", "-rm", *again, own],
        cwd=pyfuncitem.config.rootpath,
        env={name: value for name, value in os.environ.items() if name != ADDRESS},  # which sees nothing of this
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True


def save_tiny(folder: Path) -> None:
    """A small model with random weights and its tokenizer, as save_pretrained leaves them."""
    import yaml
    from transformers import AutoModelForCausalLM

    from lora_lab.composition.compose import CONF
    from lora_lab.config import ModelConfig
    from lora_lab.options import ModelSource, Weights
    from lora_lab.worker.models import load_architecture
    from lora_lab.worker.tiny_tokenizer import tiny_tokenizer

    shapes = yaml.safe_load((CONF / "model" / "tiny.yaml").read_text())["architecture"]
    config = load_architecture(ModelConfig(source=ModelSource.tiny, weights=Weights.random, architecture=shapes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


class Server:
    """A real tracking server on loopback, which can be stopped and started again where it was."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._home = home
        self._process: Running | None = None

    def start(self) -> None:
        """Start what `mlflow server` starts, with the variables that it sets."""
        from mlflow.server import constants

        asked = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # five processes that import MLflow, for jobs of GenAI's
            constants.BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{self._home}/server.db",
            constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
            constants.ARTIFACTS_DESTINATION_ENV_VAR: str(self._home / "artifacts"),
            constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        }
        command = ["mlflow.server.fastapi_app:app", "--port", str(self._port), "--log-level", "error"]
        self._process = SERVER.start("uvicorn", command, self._home, {**SERVER.environment, **asked})
        until(lambda: _answers(f"{self.uri}/health"), "the tracking server answers", seconds=90)

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, how)
            self._process.communicate(timeout=30)
            self._process = None

    def __enter__(self) -> "Server":
        self._home.mkdir()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGTERM)


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
        return True
    return False


def until(happened: Callable[[], bool], what: str, seconds: float = 120, pause: float = 0.1) -> None:
    """Wait until something is seen."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not seen within {seconds:.0f} s: {what}"
        time.sleep(pause)
