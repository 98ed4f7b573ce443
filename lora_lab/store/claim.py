"""Let one process at a time change what an attempt at a trial left: record and deliver it, or set it aside.

Without that, a start that delivers a killed job would find its files moved by the process that resumes the job. It
could also note a record as delivered after that process has removed it; then no later start would record the job."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".claim.lock"


@contextlib.contextmanager
def claim(folder: Path, seconds: float = 0.0) -> Iterator[bool]:
    """Yield whether this process has the trial's folder for itself until the end of the block.

    Where no lock can be written it has: then nothing can be moved there either.

    Args:
        seconds: how long to wait for another process."""
    lock = FileLock(folder / LOCK, timeout=seconds)
    is_ours = True
    try:
        lock.acquire()
    except Timeout:
        is_ours = False
    except OSError:
        pass
    try:
        yield is_ours
    finally:
        lock.release()
