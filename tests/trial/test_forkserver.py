"""Helper processes that hang, die or see too much: each is given up after its limit, and nothing is waited for ever."""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from conftest import Lab, record_of
from fakes import workers

from lora_lab.config import TrialConfig
from lora_lab.events import Ended, Event, PhaseBegan, Ready, Warned
from lora_lab.options import Isolation
from lora_lab.outcome import End, Outcome
from lora_lab.trial import forkserver, worker_process
from lora_lab.trial.worker_process import check_trials, run_workers
from lora_lab.worker import process

pytestmark = pytest.mark.timeout(120)  # what hangs here hangs for ever

SECONDS = 1.0


def server_pid() -> int:
    pid = forkserver.forkserver._forkserver._forkserver_pid
    assert isinstance(pid, int)
    return pid


@pytest.fixture(autouse=True)
def light_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server of this test alone, which imports nothing; short limits."""
    forkserver.end_server()
    forkserver.context.set_forkserver_preload([])
    monkeypatch.setattr(forkserver, "ANSWER_SECONDS", SECONDS * 3)
    monkeypatch.setattr(worker_process, "_GRACE_SECONDS", SECONDS)
    monkeypatch.setattr(worker_process, "_LEAVING_SECONDS", SECONDS)
    yield
    forkserver.end_server()
    forkserver.context.set_forkserver_preload(["lora_lab.worker.preload"])


def stopped_server() -> int:
    forkserver.prepare()
    os.kill(server_pid(), signal.SIGSTOP)
    return server_pid()


@pytest.fixture
def no_interrupt() -> Iterator[Connection]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        yield receiver


@pytest.fixture
def worker() -> Iterator[Any]:
    started = forkserver.context.Process(target=time.sleep, args=(60,))
    yield started
    if started.pid:
        started.kill()
        started.join()


def test_the_start_method_that_joblib_sets_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "loky")
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda method, **_: chosen.append(method))
    monkeypatch.setattr(forkserver.forkserver, "ensure_running", lambda: None)
    forkserver.prepare()
    assert chosen == ["forkserver"], "Python can't start a process by a method that it does not know"


def test_environment_variables_stay_while_a_server_runs(
    worker: Any, no_interrupt: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials in other threads read them."""
    seen: list[object] = []
    monkeypatch.setattr(forkserver, "_set", seen.append)
    forkserver.prepare()
    assert seen, "a new server gets variables of its own"
    seen.clear()
    assert forkserver.start(worker, no_interrupt, SECONDS * 3) == ""
    assert worker.is_alive()
    assert seen == []


def test_a_server_that_is_stopped_is_replaced(worker: Any, no_interrupt: Connection) -> None:
    before = stopped_server()
    assert forkserver.start(worker, no_interrupt, SECONDS) == ""
    assert worker.is_alive()
    assert server_pid() != before
    assert not psutil.pid_exists(before)


def test_a_second_server_that_hangs_too_is_said_and_ended(
    worker: Any, no_interrupt: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    monkeypatch.setattr(forkserver, "prepare", lambda once=forkserver.prepare: (once(), pids.append(stop())))

    def stop() -> int:
        os.kill(server_pid(), signal.SIGSTOP)
        return server_pid()

    assert "did not answer within 1 s" in forkserver.start(worker, no_interrupt, SECONDS)
    assert worker.pid is None
    assert len(set(pids)) == 2
    assert not any(map(psutil.pid_exists, pids))


def test_ctrl_c_ends_the_wait_for_a_server_at_once(worker: Any) -> None:
    before = stopped_server()
    interrupt, press = multiprocessing.Pipe(duplex=False)
    threading.Timer(0.3, press.send_bytes, args=(b"Ctrl-C",)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        forkserver.start(worker, interrupt, 60)
    assert time.monotonic() - began < 5
    assert not psutil.pid_exists(before)


DYING = {
    "ImportError": "raise ImportError('gone')",
    "OSError": "raise OSError('gone')",
    "RuntimeError": "raise RuntimeError('gone')",
    "SyntaxError": "1 1",
    "SystemExit": "raise SystemExit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "abort": "import os; os.abort()",
    "segfault": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
}


@pytest.mark.parametrize("how", DYING)
def test_a_server_that_dies_of_an_import_leaves_the_import_to_the_worker(
    how: str, worker: Any, no_interrupt: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_library.py").write_text(DYING[how])
    monkeypatch.syspath_prepend(str(tmp_path))
    forkserver.context.set_forkserver_preload(["broken_library"])
    assert forkserver.start(worker, no_interrupt, 30) == ""
    assert worker.is_alive()


def test_torch_that_cannot_be_imported_is_a_failed_trial_with_the_imports_own_error(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')")
    path = os.pathsep.join([str(tmp_path / "broken"), *filter(None, [os.environ.get("PYTHONPATH")])])
    said = lab("model=tiny", "measure=quick", "data=random_tokens", "seq_len=32", "tracking=none", PYTHONPATH=path)
    tags = record_of(tmp_path)["tags"]
    assert said.code == 1
    assert tags["outcome"] == "failed"
    assert "OSError: libcudart.so.99" in tags["reason"]
    assert "Traceback" not in said.text


@pytest.mark.parametrize("code", [1, 0, 7, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGKILL])
@pytest.mark.parametrize("begun", [True, False])
def test_what_a_worker_without_a_last_word_died_of(code: int, begun: bool, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text("Traceback ...\nRuntimeError: it is odd\n\n")
    end = worker_process._end_of_silence(code, log, begun)
    importing = not begun and code != -signal.SIGKILL
    assert ("imported: RuntimeError: it is odd" in end.reason) == importing
    assert end.outcome is (Outcome.failed if importing or code >= 0 else Outcome.killed)


def test_a_worker_that_never_speaks_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "main", workers.silent)
    end = run_workers(TrialConfig(), {}, tmp_path, lambda _: None)
    assert end.outcome is Outcome.failed
    assert "did not begin" in end.reason
    assert run_next(tmp_path, monkeypatch)


def test_a_worker_that_speaks_without_a_pause_has_a_time_limit_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "main", workers.never_pauses)
    end = run_workers(TrialConfig(timeout_minutes=SECONDS / 60), {}, tmp_path, lambda _: None)
    assert end.outcome is Outcome.timed_out


def test_two_workers_speak_in_one_stream_each_with_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "main", workers.of_two)
    heard: list[Event] = []
    end = run_workers(TrialConfig(), {}, tmp_path, heard.append, world_size=2)
    assert end == End(outcome=Outcome.finished, reason="")
    assert {(event.rank, event.text) for event in heard if isinstance(event, Warned)} == {(0, "0 of 2"), (1, "1 of 2")}
    assert sorted(event.rank for event in heard if isinstance(event, Ready | Ended)) == [0, 0, 1, 1]
    assert [event.phase for event in heard if isinstance(event, PhaseBegan)] == ["of 0"], "the lead speaks"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("main", "outcome", "reason"),
    [
        (workers.second_dies, Outcome.killed, "rank 1: the worker was ended by SIGKILL"),
        (workers.second_fails, Outcome.out_of_memory, "rank 1: its memory is full"),
    ],
)
def test_one_of_two_workers_ends_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Any, outcome: Outcome, reason: str
) -> None:
    monkeypatch.setattr(process, "main", main)
    heard: list[Event] = []
    end = run_workers(TrialConfig(), {}, tmp_path, heard.append, world_size=2)
    assert end.outcome is outcome
    assert end.reason.startswith(reason)
    assert not any(psutil.pid_exists(event.pid) for event in heard if isinstance(event, Ready))
    assert not multiprocessing.active_children()
    assert run_next(tmp_path, monkeypatch)


def run_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the next trial runs."""
    monkeypatch.setattr(process, "main", workers.speaks)
    return run_workers(TrialConfig(), {}, folder, lambda _: None).outcome is Outcome.finished


def test_a_server_that_hangs_while_a_trial_runs_costs_neither_this_one_nor_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "main", workers.speaks)

    def stop_the_server(event: object) -> None:
        if isinstance(event, Ready):
            os.kill(server_pid(), signal.SIGSTOP)

    assert run_workers(TrialConfig(), {}, tmp_path, stop_the_server).outcome is Outcome.finished
    assert run_next(tmp_path, monkeypatch)


def test_a_check_that_hangs_is_given_up_and_what_it_had_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "check", workers.looks_once)
    seen: list[int] = []
    looks, why = check_trials([TrialConfig()] * 3, tmp_path / "check.log", seen.append, seconds=SECONDS)
    assert [look.faults for look in looks] == [("the first is refused",), (), ()]
    assert "did not answer within 1 s" in why
    assert seen == [1]
    assert not multiprocessing.active_children()


def test_ctrl_c_ends_a_check_that_hangs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "check", workers.looks_once)
    threading.Timer(1.5, os.kill, args=(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        check_trials([TrialConfig()] * 3, tmp_path / "check.log", lambda _: None, seconds=60)
    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


def read_by(*files: str) -> set[str]:
    """The names that a library's files look up in the environment."""
    found: set[str] = set()
    for name in files:
        package, _, inside = name.partition("/")
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        text = (Path(spec.origin).parent / inside).read_text(encoding="utf-8")
        found |= set(re.findall(r"(?:environ|getenv|from_env|int_from_env)[^\n\"']{0,12}\"([A-Z][A-Z_0-9]+)\"", text))
        found |= set(re.findall(r"\"((?:PMI|OMPI|MV2)_[A-Z_]+)\"", text))
        found |= {f"{prefix}X" for prefix in re.findall(r"prefix = \"([A-Z_0-9]+_)\"", text)}
    return found


NO_LAUNCHERS = {
    "OMP_NUM_THREADS",  # the user's own choice, on which a CPU's speed depends
    "PYTORCH_ENABLE_MPS_FALLBACK",  # Apple's
    "USE_LIBUV",  # how processes connect; there is one
    "NCCL_IB_DISABLE",
}
READ = sorted(
    read_by(
        "accelerate/state.py",
        "accelerate/parallelism_config.py",
        "accelerate/utils/dataclasses.py",
        "transformers/training_args.py",
        "transformers/modeling_utils.py",
        "torch/distributed/rendezvous.py",
    )
    - NO_LAUNCHERS
)
TORCHRUN = ["GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"]
LEFT_BEHIND = [*READ, *TORCHRUN, "MASTER_ADDR", "SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"]


def test_the_variables_that_libraries_read_were_found() -> None:
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "FSDP_X", "PMI_SIZE"} <= set(READ)


@pytest.fixture
def after_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LEFT_BEHIND:
        monkeypatch.setenv(name, "2")


@pytest.mark.usefixtures("after_a_launcher")
def test_nothing_that_a_launcher_left_behind_reaches_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(forkserver.forkserver, "ensure_running", lambda: seen.append(dict(os.environ)))
    forkserver.prepare()
    assert not seen[0].keys() & set(LEFT_BEHIND)
    assert os.environ["RANK"] == "2", "the user's environment is as it was"


@pytest.mark.usefixtures("after_a_launcher")
def test_nothing_that_a_launcher_left_behind_reaches_a_trial_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def run_trial(config: TrialConfig, folder: Path, emit: Any) -> None:
        seen.append(dict(os.environ))
        emit(workers.ended())

    stub: Any = ModuleType("lora_lab.worker.trial")
    stub.run_trial = run_trial
    monkeypatch.setitem(sys.modules, "lora_lab.worker.trial", stub)
    config = TrialConfig(isolation=Isolation.inline)
    assert run_workers(config, {"TOKENIZERS_PARALLELISM": "no"}, tmp_path, lambda _: None).outcome is Outcome.finished
    assert not seen[0].keys() & set(LEFT_BEHIND)
    assert seen[0]["TOKENIZERS_PARALLELISM"] == "no"


@pytest.mark.parametrize("dies", ["before", "after"])
@pytest.mark.usefixtures("after_a_launcher")
def test_a_worker_of_a_server_that_had_to_be_replaced_sees_none_of_it_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """A server dies just before it is looked for, when nobody knows yet, or just after it was found."""
    killed: list[int] = []

    def prepare(once: Any = forkserver.prepare) -> None:
        if dies == "after":
            once()
        if len(killed) < 1:
            killed.append(server_pid())
            os.kill(killed[0], signal.SIGKILL)
        if dies == "before":
            once()

    forkserver.prepare()
    monkeypatch.setattr(process, "main", workers.says_launchers)
    monkeypatch.setattr(forkserver, "prepare", prepare)
    assert run_workers(TrialConfig(), {}, tmp_path, lambda _: None).reason == ""
    assert server_pid() not in killed
