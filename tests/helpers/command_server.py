"""A process that has imported everything a command needs and forks one child per command.

Starting Python and importing torch, transformers and MLflow takes ten seconds of a tiny trial's twelve. A test that
looks at a trial's record, tables or messages learns nothing from them. The child differs from `python -m` in its
imports alone: it runs the same module as `__main__`, in its own folder, with its own pipes, and ends as an interpreter
ends.

The workers of pytest-xdist share the server of the process that started them.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from quick_stores import MIGRATED, copy_tables, leave_stores_unsynced, make_first_store

_READ_LATE = {
    *("COLUMNS", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "SABOTAGE"),
    *("PATH", "FAKE_SLURM"),  # each command is looked for when it is to be run
    *("CXX", "TORCHINDUCTOR_CACHE_DIR"),  # by what is looked at before a worker is asked for; torch reads CXX early
    *("TORCHDYNAMO_DISABLE", "HF_TOKEN", "MY_PASSWORD", "DB_URL", MIGRATED),
}
"""Variables that no module reads while it is imported; neither are those of the fake driver (tests/fakes)."""
_FAKE_DRIVER = "FAKE_NVML_"
_FAKES = Path(__file__).resolve().parents[1] / "fakes"
ADDRESS = "LORA_LAB_TESTS_SERVER"
"""Where the workers of pytest-xdist find the server that they share: the name of an abstract socket."""

_MESSAGE_BYTES = 1 << 20

_OFTEN = (
    (),
    ("model=tiny", "measure=quick"),
    ("model=tiny", "data=random_tokens", "measure=quick"),
    ("precision=fp32", "method=lora", "model=tiny", "data=random_tokens", "measure=quick"),
)
"""Options that most tests choose."""


class CommandServer:
    """The server, started at the first command."""

    environment: Mapping[str, str]
    """What the server starts with."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def share(self) -> None:
        """Start the server, which imports nothing before the first of this process's children asks for something."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            os.environ[ADDRESS] = f"lora_lab-tests-{os.getpid()}"
            listener.bind(f"\0{os.environ[ADDRESS]}")
            listener.listen()
            self._start(listener)

    def serves(self, variables: Mapping[str, str]) -> bool:
        """Whether a command with these variables of its own may be forked: libraries read some while being imported."""
        return all(
            name in _READ_LATE
            or name.startswith(_FAKE_DRIVER)
            or self.environment.get(name) == value
            or (name == "PYTHONPATH" and self._adds_fakes(value))
            for name, value in variables.items()
        )

    def _adds_fakes(self, path: str) -> bool:
        """Whether this PYTHONPATH has nothing more than the tests' own but the folders of fakes, which are played."""
        own = self.environment.get("PYTHONPATH", "").split(os.pathsep)
        return all(Path(part).is_relative_to(_FAKES) for part in path.split(os.pathsep) if part not in own)

    def run(
        self, module: str, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float
    ) -> tuple[int, str, str]:
        """Run `python -m module arguments`; the exit code as subprocess has it, and what was written."""
        pipes = [os.pipe() for _ in ("status", "out", "err")]
        reads = [read for read, _ in pipes]
        self._ask(module, arguments, cwd, environment, [write for _, write in pipes])
        pid = int(_word(reads[0]))
        try:
            status, out, err = _read_all(reads, seconds)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired([module, *arguments], seconds) from None
        finally:
            for read in reads:
                os.close(read)
        if not status:
            raise RuntimeError(f"the command server ended while {module} ran:\n{err.decode()}")
        return int(status), out.decode(), err.decode()

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        kept: Sequence[int] = (),
    ) -> "Running":
        """Start `python -m module arguments` in a session of its own, its errors among its output.

        Args:
            kept: descriptors that it has too, under the same numbers.
        """
        (status, status_end), (out, out_end) = os.pipe(), os.pipe()
        ends = [status_end, out_end, out_end]
        self._ask(module, arguments, cwd, environment, ends, closed=[status_end, out_end], kept=kept)
        return Running(status, out)

    def _ask(
        self,
        module: str,
        arguments: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        ends: Sequence[int],
        closed: Sequence[int] | None = None,
        kept: Sequence[int] = (),
    ) -> None:
        """Have the server fork a command that writes to these ends of pipes, and close them here."""
        if self._socket is None:
            self._connect()
        assert self._socket is not None
        request = {"module": module, "arguments": arguments, "cwd": str(cwd), "environment": dict(environment)}
        request |= {"session": closed is not None, "kept": list(kept)}
        socket.send_fds(self._socket, [json.dumps(request).encode()], [*ends, *kept])
        for end in ends if closed is None else closed:
            os.close(end)

    def stop(self) -> None:
        """End the server and the commands that it runs, or leave the one that is shared."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _connect(self) -> None:
        if ADDRESS in os.environ:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.connect(f"\0{os.environ[ADDRESS]}")
        else:
            self._start()

    def _start(self, *listeners: socket.socket) -> None:
        from lora_lab.trial.variables import of_server

        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = [theirs.fileno(), *(listener.fileno() for listener in listeners)]
            self._process = subprocess.Popen(
                [sys.executable, __file__, *map(str, descriptors)],
                env={**self.environment, **{name: value for name, value in of_server().items() if value is not None}},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,
            )


class Running:
    """A command that the server has started; what tests need of subprocess.Popen."""

    returncode: int | None = None

    def __init__(self, status: int, out: int) -> None:
        self._status, self._out = status, out
        self._written: str | None = None
        self.pid = int(_word(status))

    def kill(self) -> None:
        """Send SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end; the exit code."""
        if self.returncode is None:
            ready = select.select([self._status], [], [], timeout)[0]
            if not ready:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(_word(self._status))
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Wait until nobody can write any more; what was written."""
        if self._written is None:
            try:
                [written] = _read_all([self._out], timeout)
            except TimeoutError:
                raise subprocess.TimeoutExpired(str(self.pid), timeout) from None
            self._written = written.decode()
            self.wait(timeout)
            os.close(self._status)
            os.close(self._out)
        return self._written, None


def _word(descriptor: int) -> bytes:
    """Read up to the next blank."""
    word = b""
    while (letter := os.read(descriptor, 1)) != b" ":
        if not letter:
            raise RuntimeError("the command server has ended")
        word += letter
    return word


def _read_all(descriptors: Sequence[int], seconds: float) -> list[bytes]:
    """What comes through these pipes until all are closed, as subprocess.run waits for a command's output."""
    end = time.monotonic() + seconds
    read = dict.fromkeys(descriptors, b"")
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                read[key.fd] += piece
                if not piece:
                    selector.unregister(key.fd)
    return [read[descriptor] for descriptor in descriptors]


def _import_everything() -> None:
    """Import what the product's own server of workers does, and what its commands do once they are asked; look at this
    machine and this code."""
    import alembic.command  # noqa: F401  # MLflow does when it looks at a store
    import hydra._internal.core_plugins.basic_launcher
    import hydra._internal.core_plugins.basic_sweeper
    import hydra._internal.core_plugins.file_config_source  # noqa: F401
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    import sqlalchemy.orm
    from transformers import conversion_mapping

    import lora_lab.sweep.sweeper
    import lora_lab.worker.preload  # noqa: F401
    from lora_lab.composition import command, compose
    from lora_lab.store import local_store
    from lora_lab.store.environment import environment

    for name in ("lora_lab.best", "lora_lab.recompute", "lora_lab.report.__main__"):
        importlib.import_module(name)
        del sys.modules[name]  # it is to be run
    environment()
    compose.register_schema()
    for words in _OFTEN:
        command._composed(words, ())  # what most trials' commands are compared with
    leave_stores_unsynced()
    copy_tables()
    make_first_store()
    sqlalchemy.orm.configure_mappers()
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # hundreds of patterns, compiled once a process
    inspect.getmodule(compile("", "nowhere", "exec"))  # it looks every module's path up, and torch.library asks it
    local_store.LOCKED_SECONDS = 0.5  # tests lock a store for a whole sweep; each delivery waits
    gc.collect()
    gc.freeze()


def _serve(tests: socket.socket, listener: socket.socket | None) -> dict[str, object]:
    """Fork a child per request, and say its pid and how it ended; returns in the child, with its request.

    Args:
        tests: closed by the process that started the server when the tests are over; it may ask for commands too.
        listener: where its children connect to ask for commands.
    """
    asking = [tests]
    listening = [listener] if listener else []
    running: dict[int, tuple[int, int]] = {}  # by the descriptor that becomes readable with its end: pid, status pipe
    while True:
        for ready in select.select([*asking, *listening, *running], [], [])[0]:
            if ready in listening:
                asking.append(ready.accept()[0])
                continue
            if ready in running:
                pid, status = running.pop(ready)
                _, how = os.waitpid(pid, 0)
                _say(status, os.waitstatus_to_exitcode(how))
                os.close(ready)
                os.close(status)
                continue
            message, descriptors, _, _ = socket.recv_fds(ready, _MESSAGE_BYTES, 16)
            if ready is tests and not message:
                raise SystemExit(0)
            if not message:
                asking.remove(ready)
                ready.close()
                continue
            status, out, err, *kept = descriptors
            pid = os.fork()
            if pid == 0:
                for each in (*asking, *listening):
                    each.close()
                os.close(status)
                for watched, (_, other) in running.items():
                    os.close(watched)
                    os.close(other)
                for descriptor, standard in ((out, 1), (err, 2)):
                    os.dup2(descriptor, standard)
                    os.close(descriptor)
                request = dict(json.loads(message))
                _renumber(kept, request["kept"])
                if request["session"]:
                    os.setsid()
                return request
            for descriptor in (out, err, *kept):
                os.close(descriptor)
            _say(status, pid)
            running[os.pidfd_open(pid)] = (pid, status)


def _say(descriptor: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the test that asked has ended
        os.write(descriptor, f"{number} ".encode())


class _Spare:
    """A fork of the server in which a command's own server of workers will run.

    It is made before the command does anything, so that it knows nothing of it; the command hands it what a new
    interpreter would have been given: an environment, descriptors and the code to run.
    """

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _become_server_of_workers(theirs)
        theirs.close()

    def take(self, code: str, descriptors: Sequence[int]) -> int:
        """Run `code` with these descriptors there; the process's id."""
        request = {"code": code, "descriptors": descriptors, "environment": dict(os.environ), "cwd": str(Path.cwd())}
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        self._socket.close()
        return self._pid


def _become_server_of_workers(requests: socket.socket) -> None:
    message, received, _, _ = socket.recv_fds(requests, _MESSAGE_BYTES, 16)
    if not message:
        os._exit(0)  # the command needed no worker
    requests.close()
    request = json.loads(message)
    _renumber(received, request["descriptors"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    with contextlib.suppress(SystemExit):  # how multiprocessing's server ends
        exec(request["code"], {})
    _leave(0)


def _renumber(received: Sequence[int], numbers: Sequence[int]) -> None:
    """Have these descriptors under the numbers that they have where they come from."""
    above = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 512) for descriptor in received]
    for descriptor in received:
        os.close(descriptor)
    for descriptor, number in zip(above, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _fork_instead_of_spawning(spare: _Spare) -> None:
    """Have multiprocessing's first start of a server take the spare; what comes after it is started for real."""
    from multiprocessing import util

    spawn = util.spawnv_passfds
    spares = [spare]

    def start(path: str, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
        if spares and arguments[-1].startswith("from multiprocessing.forkserver import main"):
            return spares.pop().take(arguments[-1], descriptors)
        return int(spawn(path, arguments, descriptors))

    util.spawnv_passfds = start  # type: ignore[assignment]


def _take_from_path(path: Sequence[str]) -> None:
    """Have what lies in folders that the server's PYTHONPATH lacks stand for modules that it has imported, and run what
    an interpreter runs at its start: tests/fakes."""
    before = [folder for folder in path if folder and folder not in sys.path]
    sys.path[1:1] = before
    for file in (file for folder in before for file in Path(folder).glob("*.py")):
        stale = sys.modules.pop(file.stem, None)
        if stale is not None or file.stem == "sitecustomize":
            fresh = importlib.import_module(file.stem)
            for module in list(sys.modules.values()):
                if stale is not None and vars(module).get(file.stem) is stale:
                    setattr(module, file.stem, fresh)


def _main() -> None:
    tests, *listeners = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    select.select([tests, *listeners], [], [])
    _import_everything()
    assert threading.active_count() == 1, "a server with threads must not fork"
    request = _serve(tests, listeners[0] if listeners else None)
    sys.path[0] = str(request["cwd"])
    os.chdir(str(request["cwd"]))
    environment = dict(request["environment"])  # type: ignore[call-overload]
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it is asked for while things are imported, and each worker of pytest-xdist has its own
    _take_from_path(environment.get("PYTHONPATH", "").split(os.pathsep))
    spare = _Spare()
    _fork_instead_of_spawning(spare)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = request["arguments"]  # type: ignore[assignment]
    code: str | int | None = 0
    try:
        runpy.run_module(str(request["module"]), run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            raise
    _leave(code or 0)


def _leave(code: int) -> NoReturn:
    """End as an interpreter does, but for its last look at every object, which would copy the server's memory."""
    threading._shutdown()  # type: ignore[attr-defined]  # multiprocessing ends its forks by these two as well
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _main()
