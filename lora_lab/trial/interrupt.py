"""Let Ctrl-C reach a trial in whichever thread it runs: Python tells the main thread alone."""

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait


class Interrupt:
    """A Ctrl-C that the main thread passes on to trials in other threads."""

    def __init__(self) -> None:
        self.receiver, self._sender = multiprocessing.Pipe(duplex=False)
        """`receiver` has something to read once it was passed on, for every thread: nobody reads it."""

    def pass_on(self) -> None:
        """Interrupt all trials that this reaches, now and later."""
        self._sender.send_bytes(b"Ctrl-C")


_of_thread = threading.local()


@contextlib.contextmanager
def reached_by(interrupt: Interrupt) -> Iterator[None]:
    """Let `interrupt` reach what this thread does meanwhile."""
    _of_thread.interrupt = interrupt
    try:
        yield
    finally:
        del _of_thread.interrupt


def pause(seconds: float) -> None:
    """Sleep.

    Raises: KeyboardInterrupt when a Ctrl-C reached this thread; the main thread gets it from Python."""
    interrupt: Interrupt | None = getattr(_of_thread, "interrupt", None)
    if interrupt is None:
        time.sleep(seconds)
    elif wait([interrupt.receiver], seconds):
        raise KeyboardInterrupt


@contextlib.contextmanager
def ctrl_c() -> Iterator[Connection]:
    """Yield a connection that has something to read once Ctrl-C was pressed. An exception could interrupt any line
    instead, even a destructor, where Python drops it and the trial would go on."""
    if threading.current_thread() is not threading.main_thread():
        interrupt: Interrupt = getattr(_of_thread, "interrupt", None) or Interrupt()
        yield interrupt.receiver
        return
    receiver, sender = multiprocessing.Pipe(duplex=False)
    before = signal.signal(signal.SIGINT, lambda *_: sender.send_bytes(b"Ctrl-C"))
    try:
        yield receiver
    finally:
        signal.signal(signal.SIGINT, before)
