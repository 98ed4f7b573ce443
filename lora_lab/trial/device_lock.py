"""One trial at a time on a device: our own trials queue, other people's processes are seen."""

import contextlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lora_lab.config import InvalidInput
from lora_lab.files import write_text
from lora_lab.telemetry.figures import GIB
from lora_lab.telemetry.nvml import Card
from lora_lab.telemetry.sampler import Sample, SensorFailed

_FREED_SECONDS = 10.0
"""What a driver may take to give back the memory of a worker that has left."""

_SLACK_BYTES = 64 * 2**20
"""A card's use varies by this much without anybody calculating."""

_COOL_DOWN_SECONDS = 600.0

_SAY_AGAIN_SECONDS = 300.0
"""How often it is said that a device is still waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """A card as a trial found it."""

    used_bytes: int | None = None
    """Device memory in use; None without a sensor."""
    shared_with: str = ""
    """Who else calculated on the card, where that was allowed; empty when nobody did."""


@contextlib.contextmanager
def device_lock(card: Card | None, share: bool, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the device; wait for another trial of ours that has it. A killed process holds nothing.

    Args:
        share: do not lock.
        waiting: takes in words whom there is to wait for, at once and every few minutes.
    """
    if share:
        yield
        return
    # one place for all of a user's processes, whatever folder they were started in
    folder = _lock_folder(Path(tempfile.gettempdir()) / f"lora_lab-{os.getuid()}")
    name = re.sub(r"[^A-Za-z0-9-]", "_", card.uuid) if card else "cpu"
    lock, holder = FileLock(folder / f"{name}.lock"), folder / f"{name}.holder"
    _acquire(lock, lambda: waiting(f"waiting for {card.name if card else 'the CPU'}, on which {_holder(holder)}"))
    try:
        write_text(holder, f"{os.getpid()}")  # by a rename, which follows no link
        yield
    finally:
        lock.release()


def _lock_folder(folder: Path) -> Path:
    """The folder of the locks. Everybody may write to the one above it, so it is taken only if it is ours alone.

    Raises: InvalidInput when it is not."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            fault = "is no folder"
        elif found.st_uid != os.getuid():
            fault = f"belongs to another user ({found.st_uid})"
        else:
            folder.chmod(0o700)
            return folder
    except OSError as error:
        fault = f"can't be used ({error.strerror})"
    raise InvalidInput(
        f"{folder}, where trials queue for a device, {fault}. Remove it, or set TMPDIR to a folder that is yours."
    )


def _acquire(lock: FileLock, say: Callable[[], None]) -> None:
    """Without a limit: a trial may take days. Ctrl-C ends the wait."""
    seconds = 0.0
    while True:
        try:
            lock.acquire(timeout=seconds)
            return
        except Timeout:
            say()
            seconds = _SAY_AGAIN_SECONDS


def _holder(holder: Path) -> str:
    """Who holds a device, and whether that is stopped and would go on holding it."""
    try:
        pid = int(holder.read_text(encoding="ascii"))
        stopped = psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except (OSError, ValueError, psutil.Error):
        return "another process runs a trial"
    how = f"; it is stopped: `kill -CONT {pid}` lets it go on, `kill -KILL {pid}` ends it" if stopped else ""
    return f"process {pid} runs a trial{how}"


def look_at(card: Card | None, share: bool) -> Before:
    """The card before a trial.

    Raises: InvalidInput when somebody else calculates on it, unless `share`.
    """
    if card is None:
        return Before()
    users = {pid: used for pid, used in card.users().items() if pid != os.getpid()}  # isolation=inline
    with_whom = ", ".join(_user(pid, used) for pid, used in users.items())
    if users and not share:
        raise InvalidInput(
            f"{card.name} (gpu:{card.index}) is in use by {with_whom}: neither speed nor memory nor energy would be "
            "the trial's own. Wait for it, end it, choose another card with device=gpu:N, or measure all the same "
            "with share_device=true; the record will say so."
        )
    sample = _sample(card)
    return Before(
        used_bytes=sample.used_bytes if sample else None,
        shared_with=with_whom,
    )


def temperature(card: Card | None) -> float | None:
    """Degrees Celsius of the card now; None without a reading."""
    sample = _sample(card) if card else None
    return sample.temperature_celsius if sample else None


def see_freed(card: Card | None, before: Before, share: bool) -> tuple[int | None, str]:
    """Wait until the card's memory is what it was before the trial; with `share` others change it too, so that
    nothing is waited for.

    Returns: bytes in use now, None without a reading; empty, or who holds how much after all.
    """
    if card is None or before.used_bytes is None or share:
        return None, ""
    end = time.monotonic() + _FREED_SECONDS
    while (sample := _sample(card)) and sample.used_bytes is not None:
        held = sample.used_bytes - before.used_bytes
        if held <= _SLACK_BYTES:
            return sample.used_bytes, ""
        if time.monotonic() > end:
            who = ", ".join(_user(pid, used) for pid, used in card.users().items()) or "no process that can be seen"
            said = f"{held / GIB:.2f} GiB of {card.name} were not free again after the trial; held by {who}"
            return sample.used_bytes, said
        time.sleep(0.05)
    return None, ""


def cool_down(card: Card | None, to_celsius: float | None, waiting: Callable[[str], None]) -> str:
    """Wait until the card is no warmer than `to_celsius`.

    Returns: empty, or why the trial starts warmer.
    """
    if card is None or to_celsius is None:
        return ""
    end = time.monotonic() + _COOL_DOWN_SECONDS
    told = False
    while (sample := _sample(card)) and sample.temperature_celsius is not None:
        if sample.temperature_celsius <= to_celsius:
            return ""
        if time.monotonic() > end:
            return f"the card was still at {sample.temperature_celsius:.0f} degrees after {_COOL_DOWN_SECONDS:.0f} s"
        if not told:
            waiting(f"cooling down from {sample.temperature_celsius:.0f} to {to_celsius:g} degrees")
            told = True
        time.sleep(1.0)
    return "the card's temperature can't be read"


def _sample(card: Card) -> Sample | None:
    with contextlib.suppress(SensorFailed):
        return card.sample()
    return None


def _user(pid: int, used_bytes: int | None) -> str:
    try:
        name = psutil.Process(pid).name()
    except psutil.Error:
        name = "outside this container"
    held = "" if used_bytes is None else f", {used_bytes / GIB:.2f} GiB"
    return f"process {pid} ({name}{held})"
