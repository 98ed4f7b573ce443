"""The server that forks workers: started once, asked for each worker, replaced when it does not answer."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver, process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess

from lora_lab.trial.variables import of_server

ANSWER_SECONDS = 180.0
"""Time for the server to import torch and fork a worker, and for the worker's first event. It usually takes seconds; on
a slow network disk it takes a minute."""

_ONE_AT_A_TIME = threading.RLock()
"""Trials in several threads ask one after the other: meanwhile this process's environment is changed."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["lora_lab.worker.preload"])


def prepare() -> None:
    """Start the server and return at once, while the server imports torch for some seconds. It must not see a GPU:
    importing would initialise CUDA, which can't be forked."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method("forkserver", force=True)  # joblib's loky has set its own name
    with _ONE_AT_A_TIME:
        if not _is_running():  # while one runs, the environment stays: other threads read it
            with changed_environment(of_server()):
                forkserver.ensure_running()


@contextlib.contextmanager
def changed_environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Set these variables for a while; None removes one."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _is_running() -> bool:
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    try:
        return pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:  # it has ended, and somebody has asked for its exit code
        return False


def _set(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def start(worker: ForkServerProcess, interrupt: Connection, seconds: float) -> str:
    """Have the server fork `worker`. A server that does not answer, or that dies meanwhile, is replaced once.

    Args:
        interrupt: has something to read when Ctrl-C was pressed.
        seconds: how long an answer may take.

    Returns: empty, or why there is no worker.

    Raises: KeyboardInterrupt.
    """
    why = ""
    with _ONE_AT_A_TIME:
        for _ in range(2):
            prepare()
            why = _ask(worker, interrupt, seconds)
            if not why:
                break
        if threading.current_thread() is not threading.main_thread():
            # Python polls all processes that it knows whenever one starts, here in any thread, and the second reader of
            # an exit code gets 255
            process._children.discard(worker)  # type: ignore[attr-defined]
    return why


def _ask(worker: ForkServerProcess, interrupt: Connection, seconds: float) -> str:
    """Ask for a worker in a thread. Python waits for the server's answer without a limit, and a Ctrl-C that does not
    raise does not end that wait. The server's end does."""
    answered, asked = multiprocessing.Pipe(duplex=False)
    failed: list[BaseException] = []

    def ask() -> None:
        with asked:
            try:
                worker.start()
            except (OSError, EOFError) as error:
                failed.append(error)

    thread = threading.Thread(target=ask, name="asks for a worker")
    with answered, _no_other_server():
        thread.start()
        ready = wait([answered, interrupt], seconds)
        if answered not in ready or failed:
            end_server()
        thread.join()
    if interrupt in ready:
        raise KeyboardInterrupt
    if not failed:
        return ""
    did = "ended" if answered in ready else f"did not answer within {seconds:g} s"
    return f"the server that forks workers {did}, and so did the next one"


@contextlib.contextmanager
def _no_other_server() -> Iterator[None]:
    """Keep Python from starting a server itself where one has just died. The new one would have this process's
    variables: a launcher's, and the cards. To ask a dead server fails instead."""
    server = forkserver._forkserver
    server.ensure_running = lambda: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del server.ensure_running


def end_server() -> None:
    """End the server, whatever its state. One that ended by itself could not import what workers need. The next one
    then imports nothing, but each worker does, and its log holds the error."""
    server = forkserver._forkserver
    pid: int | None = server._forkserver_pid  # type: ignore[attr-defined]  # the module has no public way to end it
    if pid is None:
        return
    os.kill(pid, signal.SIGKILL)  # also ends one that is stopped; does nothing to one that is dead
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    server._stop()  # type: ignore[attr-defined]
    if found is not None and (
        found.si_code == os.CLD_EXITED or found.si_status not in (signal.SIGKILL, signal.SIGTERM)
    ):
        context.set_forkserver_preload([])
