"""The worker process: start it, hear its events, survive its death."""

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path

from lora_lab.config import Isolation, TrialConfig
from lora_lab.events import Ended, Event, decode, encode
from lora_lab.outcome import End, Outcome, end_said, says_out_of_memory
from lora_lab.secrets import clean

_GRACE_SECONDS = 5.0
"""What a worker has to leave by itself after SIGTERM."""

_LEAVING_SECONDS = 30.0
"""What a worker has to leave after its last word: CUDA and its files must be closed."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lora_lab.worker.preload"])


def prepare() -> None:
    """Start the server that workers are forked from. Returns at once; the server imports torch, some
    seconds' work, meanwhile. It must not see a GPU: importing would initialise CUDA, which can't be forked."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method("forkserver", force=True)  # joblib's loky has set its own name
    with _environment(_HIDDEN):
        forkserver.ensure_running()


_HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""The server's environment. Hiding the cards is not enough: a plain `torch.cuda.is_available()` at some import
would ask the driver, which then answers 'no device' in every forked worker too. NVML is asked instead."""


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_worker(
    config: TrialConfig, environment: dict[str, str], folder: Path, on_event: Callable[[Event], None]
) -> End:
    """Run one trial in a worker of its own, or in this process with isolation=inline.

    Args:
        environment: what the worker's environment has beyond this process's (which GPU it sees).
        folder: where the worker leaves its log and its adapter.
        on_event: called with each event in order, while the worker runs.

    Returns: how the trial ended, also when the worker could not say so itself.

    Raises: KeyboardInterrupt after the worker has been ended.
    """
    if config.isolation is Isolation.inline:
        return _run_inline(config, environment, folder, on_event)
    from lora_lab.worker import process

    prepare()
    receiver, sender = _context.Pipe(duplex=False)
    worker = _context.Process(target=process.main, args=(sender, config, environment, folder), name="lora_lab worker")
    worker.start()
    sender.close()
    limit = None if config.timeout_minutes is None else config.timeout_minutes * 60
    try:
        with _ctrl_c() as interrupt:
            end = _hear(receiver, interrupt, limit, on_event)
        if end is None or end.outcome is not Outcome.timed_out:
            worker.join(_LEAVING_SECONDS)  # it has said its last word, or is gone already
    finally:
        _stop(worker)
        receiver.close()
    return end or _end_of_silence(worker.exitcode, folder)


def check_trials(configs: list[TrialConfig], log: Path) -> list[str]:
    """What each trial would be refused for, found in a worker; empty where it would not be, or where the worker
    could not tell (then the trial itself will).

    Args:
        log: gets what the worker prints.
    """
    from lora_lab.worker import process

    prepare()
    receiver, sender = _context.Pipe(duplex=False)
    worker = _context.Process(target=process.check, args=(sender, configs, log), name="lora_lab check")
    worker.start()
    sender.close()
    try:
        found: list[str] = receiver.recv()
        return found
    except (EOFError, OSError):
        return [""] * len(configs)
    finally:
        _stop(worker)
        receiver.close()
        clean(log)


def _hear(
    receiver: Connection, interrupt: Connection, limit_seconds: float | None, on_event: Callable[[Event], None]
) -> End | None:
    """Pass on events until the worker's last word; None when it left without one.

    Raises: KeyboardInterrupt when Ctrl-C was pressed.
    """
    due = math.inf if limit_seconds is None else time.monotonic() + limit_seconds
    while True:
        left = due - time.monotonic()
        ready = wait([receiver, interrupt], None if due == math.inf else max(0.0, left))
        if interrupt in ready:
            raise KeyboardInterrupt
        if not ready or left <= 0:
            why = f"not done within timeout_minutes={(limit_seconds or 0) / 60:g}"
            return End(outcome=Outcome.timed_out, reason=why)
        try:
            event = decode(receiver.recv_bytes())
        except (EOFError, OSError):
            return None
        on_event(event)
        if isinstance(event, Ended):
            return end_said(event)


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Connection]:
    """Ctrl-C as something to wait for. As an exception it could break into any line, a destructor even, where
    Python drops it, and the trial would go on."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    if threading.current_thread() is not threading.main_thread():
        yield receiver
        return
    before = signal.signal(signal.SIGINT, lambda *_: sender.send_bytes(b"Ctrl-C"))
    try:
        yield receiver
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(worker: "multiprocessing.context.ForkServerProcess") -> None:
    """SIGTERM, a grace, SIGKILL; does nothing to a worker that has left."""
    if worker.exitcode is not None:
        return
    worker.terminate()
    if not wait([worker.sentinel], _GRACE_SECONDS):
        worker.kill()
    worker.join()


def _end_of_silence(exit_code: int | None, folder: Path) -> End:
    """A worker left without a last word."""
    log = folder / "worker.log"
    last = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.is_file() else ""
    # bitsandbytes leaves the process when CUDA refuses it, a Rust library aborts it
    if exit_code in (1, -signal.SIGABRT) and says_out_of_memory(last):
        return End(outcome=Outcome.out_of_memory, reason=f"a library ended the worker; see {log}")
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; on Linux that is also how the kernel ends a process when memory runs out" if exit_code == -9 else ""
        return End(outcome=Outcome.killed, reason=f"the worker was ended by {name}{hint}")
    return End(outcome=Outcome.failed, reason=f"the worker left with exit code {exit_code}; see {log}")


def _run_inline(
    config: TrialConfig, environment: dict[str, str], folder: Path, on_event: Callable[[Event], None]
) -> End:
    from lora_lab.worker.trial import run_trial

    events: list[Event] = []

    def emit(event: Event) -> None:
        event = decode(encode(event))  # as it would come from a process
        events.append(event)
        on_event(event)

    with _environment(environment):
        run_trial(config, folder, emit)
    last = events[-1]
    assert isinstance(last, Ended)
    return end_said(last)
