"""Compiled code that a killed worker leaves half written, out of the way before another would load it.

torch has g++ write a library where it will stay, and loads whatever lies there: one that a SIGKILL cut off fails every
later trial that needs it. So a worker leaves a marker, and locks it, while it compiles. One that lies there
unlocked says since when nothing in the caches is to be trusted.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

_FOLDER = "lora_lab_compiling"
_PATIENCE_SECONDS = 120.0
_SLACK_SECONDS = 1.0
"""File times are that coarse on some disks."""
_DIGEST = re.compile("[A-Za-z2-7]{40}")
"""How torch and Triton begin the name of each file, or of the folder it lies in."""


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """For a worker to compile in: what was left half written is removed before. A cache that can't be read or written
    is used as it is."""
    marker = lock = None
    with contextlib.suppress(OSError):
        marker, lock = _begin(Path(cache_dir()))
    whole = False  # a linker that was killed alone is an exception here
    try:
        yield
        whole = True
    except torch.OutOfMemoryError:
        whole = True  # a card that is full has nothing to do with the caches
        raise
    finally:
        if marker is not None and whole:
            with contextlib.suppress(OSError):
                marker.unlink()
        if lock is not None:
            os.close(lock)


def _begin(cache: Path) -> tuple[Path, int]:
    """Clean, and leave a marker: its path, and what holds its lock."""
    folder = cache / _FOLDER
    folder.mkdir(exist_ok=True)
    end = time.monotonic() + _PATIENCE_SECONDS
    gate = os.open(folder / "gate", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            late = time.monotonic() >= end
            if _locked(gate):  # nobody else begins while files are removed
                if _clean(folder) or late:
                    marker = folder / f"{os.getpid()}-{time.time_ns()}.marker"
                    lock = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
                    _locked(lock)
                    return marker, lock
                fcntl.flock(gate, fcntl.LOCK_UN)
            elif late:
                raise TimeoutError
            time.sleep(0.1)
    finally:
        os.close(gate)


def _clean(folder: Path) -> bool:
    """Whether nothing half written is left. A live worker may be about to load what it has just written, so nothing is
    removed while there is one: to wait for it takes a minute, to take its files costs a trial."""
    left = {}
    live = False
    for marker in folder.glob("*.marker"):
        with contextlib.suppress(FileNotFoundError), open(marker, "r+b") as file:
            # the kernel takes a lock back when its process ends, in whichever container that was
            if _locked(file.fileno()):
                left[marker] = marker.stat().st_mtime
            else:
                live = True
    if not left or live:
        return not left
    since = min(left.values()) - _SLACK_SECONDS
    for cache in {folder.parent, Path(os.environ.get("TRITON_CACHE_DIR") or folder.parent)}:
        _remove_since(since, cache)
    for marker in left:
        marker.unlink()
    return True


def _remove_since(since: float, cache: Path) -> None:
    for parent, _, names in os.walk(cache):
        for name in names:
            file = Path(parent, name)
            # other things may lie in a folder that the user has named, and other programs hold locks
            if (_DIGEST.match(name) or _DIGEST.match(file.parent.name)) and file.suffix != ".lock":
                with contextlib.suppress(OSError):
                    if file.lstat().st_mtime >= since:
                        file.unlink()


def _locked(descriptor: int) -> bool:
    """Whether the lock could be had; it is held until the file is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
