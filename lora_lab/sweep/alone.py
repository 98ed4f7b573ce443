"""Let one process at a time run a sweep."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from lora_lab.config import InvalidInput
from lora_lab.reading import Damaged
from lora_lab.store.heartbeat import Heartbeat
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.sweep.checks import CHECK_LOG


@contextmanager
def alone(folder: SweepFolder) -> Iterator[None]:
    """Hold the right to run this sweep, which one process has at a time. A folder that was not used is removed again.

    Raises: InvalidInput when another process has it."""
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.path / ".sweep.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        which = "another process"
        with suppress(Damaged):  # or it has not written its plan yet
            which = f"process {folder.read().owner.pid}"
        raise InvalidInput(
            f"{which} runs a sweep in {folder.path} now. Wait for it, or name another folder (without resume=true)."
        ) from None
    try:
        with Heartbeat(folder.path):
            yield
    finally:
        if not folder.exists:
            for name in (".sweep.lock", CHECK_LOG):
                (folder.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # it may be a folder of the user's, with files in it
                folder.path.rmdir()
        lock.release()
