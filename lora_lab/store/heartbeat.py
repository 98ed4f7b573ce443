"""A sign of life in a folder: a file that the process of a trial or sweep touches every few seconds.

A process id means nothing on another host. The age of this file does, wherever the folder is visible."""

import contextlib
import os
import threading
from pathlib import Path
from tempfile import NamedTemporaryFile

from lora_lab.store.process_id import Owner

HEARTBEAT = "heartbeat"

EVERY_SECONDS = 5.0

LIMIT_SECONDS = 900.0
"""A process of another host counts as dead after this much silence. A shared disk may fail for minutes, and its clients
may cache a file's time for a minute. A machine that slept for longer than this counts as dead too."""


class Heartbeat:
    """A thread that touches the file in `folder` during a `with` block, and removes the file at its end.

    It never raises. Without a heartbeat other hosts know nothing about the process, which is also so on a full disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def __enter__(self) -> "Heartbeat":
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            (self._folder / HEARTBEAT).unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self._beat()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            (self._folder / HEARTBEAT).touch()


def gone(owner: Owner, folder: Path) -> bool:
    """Return whether the process that works in `folder` has ended.

    A process of this host is looked up by its id. A process of another host counts as ended when its heartbeat has
    stopped. Without a heartbeat nothing is known about it, and it does not count as ended."""
    if owner.is_here:
        return owner.gone
    silent = _silent_seconds(folder)
    return silent is not None and silent > LIMIT_SECONDS


def beats(folder: Path, seconds: float) -> bool:
    """Return whether the process that works in `folder` has given a sign of life within so long."""
    silent = _silent_seconds(folder)
    return silent is not None and silent < seconds


def _silent_seconds(folder: Path) -> float | None:
    """Return the seconds since the last heartbeat; None without a heartbeat, or where nothing can be written.

    The disk's clock measures them, because the clock of either host may be wrong."""
    try:
        last = (folder / HEARTBEAT).stat().st_mtime
        with NamedTemporaryFile(dir=folder, prefix=".now-") as now:
            os.utime(now.fileno())
            return os.fstat(now.fileno()).st_mtime - last
    except OSError:
        return None
