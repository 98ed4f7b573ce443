"""The worker process: start it, hear its events, survive its death."""

import contextlib
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from lora_lab.config import Isolation, TrialConfig
from lora_lab.events import Ended, Event, Ready, decode, encode
from lora_lab.look import Look
from lora_lab.outcome import End, Outcome, end_of, end_said, says_out_of_memory
from lora_lab.secrets import clean
from lora_lab.trial import forkserver
from lora_lab.trial.variables import without_launchers

_GRACE_SECONDS = 5.0
"""What a worker has to leave by itself after SIGTERM."""

_LEAVING_SECONDS = 30.0
"""What a worker has to leave after its last word: CUDA and its files must be closed."""

LOOK_SECONDS = 600.0
"""What the check has for one look at a point's rows and model: it may have to download and tokenise them."""

prepare = forkserver.prepare


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

    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (sender, config, environment, folder)
    worker = forkserver.context.Process(target=process.main, args=arguments, name="lora_lab worker")
    limit = math.inf if config.timeout_minutes is None else config.timeout_minutes * 60
    begun = False

    def hear(event: Event) -> None:
        nonlocal begun
        begun = begun or not isinstance(event, Ready)
        on_event(event)

    try:
        with _ctrl_c() as interrupt:
            with sender:
                missing = forkserver.start(worker, interrupt, forkserver.ANSWER_SECONDS)
            if missing:
                return End(outcome=Outcome.failed, reason=missing)
            end = _hear(receiver, interrupt, limit, hear)
        if end is None or end.outcome is not Outcome.timed_out:
            worker.join(_LEAVING_SECONDS)  # it has said its last word, or is gone already
    finally:
        _stop(worker, _GRACE_SECONDS)
        receiver.close()
    return end or _end_of_silence(worker.exitcode, folder / "worker.log", begun)


def check_trials(
    configs: list[TrialConfig], log: Path, seen: Callable[[int], None], seconds: float = LOOK_SECONDS
) -> tuple[list[Look], str]:
    """Look at trials before they run, in a worker.

    Args:
        log: gets what the worker prints.
        seen: called with the number of trials looked at.
        seconds: how long one look may take.

    Returns: a look at each trial, empty where the worker did not get to it (then the trial itself will tell). And
        empty, or why the worker did not get to all.

    Raises: KeyboardInterrupt.
    """
    from lora_lab.worker import process

    receiver, sender = multiprocessing.Pipe(duplex=False)
    worker = forkserver.context.Process(target=process.check, args=(sender, configs, log), name="lora_lab check")
    looks: list[Look] = []
    why = ""
    try:
        with _ctrl_c() as interrupt:
            with sender:
                why = forkserver.start(worker, interrupt, forkserver.ANSWER_SECONDS)
            while not why and len(looks) < len(configs):
                if not _says_something(receiver, interrupt, seconds):
                    why = f"the check of the points did not answer within {seconds:g} s"
                    break
                looks.append(receiver.recv())
                seen(len(looks))
    except (EOFError, OSError):
        why = f"the check of the points ended early; see {log}"
    finally:
        _stop(worker, 0.0)
        receiver.close()
        clean(log)
    return looks + [Look()] * (len(configs) - len(looks)), why


def _hear(
    receiver: Connection, interrupt: Connection, limit_seconds: float, on_event: Callable[[Event], None]
) -> End | None:
    """Pass on events until the worker's last word; None when it left without one.

    Raises: KeyboardInterrupt when Ctrl-C was pressed.
    """
    due = time.monotonic() + limit_seconds
    silence = forkserver.ANSWER_SECONDS  # until its first word
    while True:
        left = due - time.monotonic()
        if left <= 0 or not _says_something(receiver, interrupt, min(left, silence)):
            if time.monotonic() < due:
                return End(outcome=Outcome.failed, reason=f"the worker did not begin within {silence:g} s")
            return End(outcome=Outcome.timed_out, reason=f"not done within timeout_minutes={limit_seconds / 60:g}")
        silence = math.inf
        try:
            event = decode(receiver.recv_bytes())
        except (EOFError, OSError):
            return None
        on_event(event)
        if isinstance(event, Ended):
            return end_said(event)


def _says_something(receiver: Connection, interrupt: Connection, seconds: float) -> bool:
    """Wait until there is something to hear, a worker's end included; False when it has been silent for `seconds`.

    Raises: KeyboardInterrupt when Ctrl-C was pressed.
    """
    ready = wait([receiver, interrupt], None if seconds == math.inf else seconds)
    if interrupt in ready:
        raise KeyboardInterrupt
    return bool(ready)


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


def _stop(worker: ForkServerProcess, grace_seconds: float) -> None:
    """SIGTERM, a grace, SIGKILL; does nothing to a worker that has left, or never was."""
    if worker.pid is None or worker.exitcode is not None:
        return
    worker.terminate()
    if not wait([worker.sentinel], grace_seconds):
        worker.kill()
    worker.join(_GRACE_SECONDS)
    if worker.exitcode is None:  # the server says how its workers ended: it hangs
        forkserver.end_server()
        worker.join()


def _end_of_silence(exit_code: int | None, log: Path, begun: bool) -> End:
    """A worker left without a last word.

    Args:
        begun: whether it had begun with its trial, torch imported.
    """
    last = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.is_file() else ""
    # bitsandbytes leaves the process when CUDA refuses it, a Rust library aborts it
    if exit_code in (1, -signal.SIGABRT) and says_out_of_memory(last):
        return End(outcome=Outcome.out_of_memory, reason=f"a library ended the worker; see {log}")
    by_signal = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else ""
    if not begun and by_signal not in (signal.SIGKILL.name, signal.SIGTERM.name):
        how = by_signal or f"exit code {exit_code}"
        why = next((line.strip()[:300] for line in reversed(last.splitlines()) if line.strip()), "no word of why")
        return End(
            outcome=Outcome.failed,
            reason=f"torch, or what builds on it, could not be imported: {why} ({how}; see {log})",
        )
    if by_signal:
        hint = "; on Linux that is also how the kernel ends a process when memory runs out" if exit_code == -9 else ""
        return End(outcome=Outcome.killed, reason=f"the worker was ended by {by_signal}{hint}")
    return End(outcome=Outcome.failed, reason=f"the worker left with exit code {exit_code}; see {log}")


def _run_inline(
    config: TrialConfig, environment: dict[str, str], folder: Path, on_event: Callable[[Event], None]
) -> End:
    events: list[Event] = []

    def emit(event: Event) -> None:
        event = decode(encode(event))  # as it would come from a process
        events.append(event)
        on_event(event)

    with forkserver.changed_environment({**without_launchers(), **environment}):
        try:
            from lora_lab.worker.trial import run_trial
        except (ImportError, OSError, RuntimeError) as error:
            return end_of(error)
        run_trial(config, folder, emit)
    last = events[-1]
    assert isinstance(last, Ended)
    return end_said(last)
