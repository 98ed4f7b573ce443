"""Remove compiled code that a killed worker left half written, before another worker loads it.

torch has g++ write a library to its final path, and loads whatever is there: a file that a SIGKILL cut off fails every
later trial that needs it. So a worker leaves a marker, and locks it, while it compiles. An unlocked marker says since
when the files in the caches are not to be trusted.
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
"""The resolution of file times on some disks."""
_DIGEST = re.compile("[A-Za-z2-7]{40}")
"""The start of the name of each file of torch and Triton, or of its folder."""


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Wrap a compilation: remove half-written files first, and leave a marker meanwhile. A cache that can't be read or
    written is used as it is."""
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
    """Clean the caches and leave a marker.

    Returns: its path, and the descriptor that holds its lock."""
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
    """Remove half-written files, and return True where none is left. Nothing is removed while another worker compiles:
    it may be about to load what it has just written. Waiting takes a minute; removing its files costs a trial."""
    left = {}
    live = False
    for marker in folder.glob("*.marker"):
        with contextlib.suppress(FileNotFoundError), open(marker, "r+b") as file:
            # the kernel releases a lock when its process ends, in whichever container that was
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
            # a folder that the user has named may hold other files, and other programs hold locks
            if (_DIGEST.match(name) or _DIGEST.match(file.parent.name)) and file.suffix != ".lock":
                with contextlib.suppress(OSError):
                    if file.lstat().st_mtime >= since:
                        file.unlink()


def _locked(descriptor: int) -> bool:
    """Try to take the lock, and return True on success. It is held until the file is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
