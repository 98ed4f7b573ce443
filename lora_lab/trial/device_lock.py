"""Give a device to one trial at a time: trials of this user queue, and processes of others are detected."""

import contextlib
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lora_lab.config import InvalidInput
from lora_lab.placement import Placement
from lora_lab.telemetry.figures import GIB
from lora_lab.telemetry.nvml import Card
from lora_lab.telemetry.sampler import Sample, SensorFailed
from lora_lab.trial.interrupt import pause

_FREED_SECONDS = 10.0
"""How long a driver may take to free the memory of a worker that has exited."""

_SLACK_BYTES = 64 * 2**20
"""A card's memory use varies by this much while nothing calculates."""

_COOL_DOWN_SECONDS = 600.0

_SAY_AGAIN_SECONDS = 300.0
"""How often the user is reminded that a device is still waited for."""

_TRY_AGAIN_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """State of the cards before a trial."""

    used_bytes: tuple[int | None, ...] = ()
    """Device memory in use on each card; None without a sensor."""
    shared_with: str = ""
    """Other processes that calculated on a card, where that was allowed; empty without any."""


@contextlib.contextmanager
def device_lock(placement: Placement, share: bool, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the device, and wait while another trial of this user holds it. A killed process holds nothing.

    The locks of several cards are taken in the order of the cards' ids, whatever the placement's order. So two trials
    never wait for each other. On the CPU each core has a lock too: trials that share the cores take their own.

    Args:
        share: do not lock.
        waiting: gets a text that says which process is waited for, at once and every few minutes.
    """
    if share:
        yield
        return
    # one folder for all of a user's processes, wherever they were started
    folder = _lock_folder(Path(tempfile.gettempdir()) / f"lora_lab-{os.getuid()}")
    devices = sorted((card.uuid, card.name) for card in placement.cards) or _of_cpu(placement)
    with contextlib.ExitStack() as held:
        for uuid, name in devices:
            held.enter_context(_one_lock(folder / re.sub(r"[^A-Za-z0-9-]", "_", uuid), name, waiting))
        yield


def _of_cpu(placement: Placement) -> list[tuple[str, str]]:
    """Return the locks of a trial on the CPU, with names for messages: of its cores, or of the whole CPU."""
    cores = placement.cores or range(os.cpu_count() or 1)
    whole = [] if placement.cores else [("cpu", placement.name)]
    return whole + [(f"cpu-{core}", f"core {core} of the CPU") for core in sorted(cores)]


@contextlib.contextmanager
def _one_lock(path: Path, device: str, waiting: Callable[[str], None]) -> Iterator[None]:
    lock, holder = FileLock(f"{path}.lock"), Path(f"{path}.holder")
    _acquire(lock, lambda: waiting(f"waiting for {device}, on which {_holder(holder)}"))
    try:
        _note(holder)
        yield
    finally:
        lock.release()


def _note(holder: Path) -> None:
    """Write this process's id, by a rename, which does not follow a link. It need not outlive a crash of the machine,
    and a CPU has many cores: it is not forced onto the disk."""
    beside = holder.with_name(f".{holder.name}.{os.getpid()}.{threading.get_ident()}")
    beside.unlink(missing_ok=True)
    with beside.open("x", encoding="ascii") as file:
        file.write(f"{os.getpid()}")
    beside.replace(holder)


def _lock_folder(folder: Path) -> Path:
    """Return the folder of the locks. All users may write to its parent, so it must belong to this user alone.

    Raises: InvalidInput when it does not."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            fault = "is not a folder"
        elif found.st_uid != os.getuid():
            fault = f"belongs to another user ({found.st_uid})"
        else:
            folder.chmod(0o700)
            return folder
    except OSError as error:
        fault = f"can't be used ({error.strerror})"
    raise InvalidInput(
        f"{folder}, the folder of the device locks, {fault}. Remove it, or set TMPDIR to a folder of your own."
    )


def _acquire(lock: FileLock, say: Callable[[], None]) -> None:
    """Take the lock, without a time limit: a trial may take days. Ctrl-C ends the wait."""
    due = time.monotonic()
    while True:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            return
        if time.monotonic() >= due:
            say()
            due = time.monotonic() + _SAY_AGAIN_SECONDS
        pause(_TRY_AGAIN_SECONDS)


def _holder(holder: Path) -> str:
    """Describe the process that holds a device. For a stopped one, which would hold it for ever, add how
    to continue or end it."""
    try:
        pid = int(holder.read_text(encoding="ascii"))
        stopped = psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except (OSError, ValueError, psutil.Error):
        return "another process runs a trial"
    how = f"; it is stopped: `kill -CONT {pid}` continues it, `kill -KILL {pid}` ends it" if stopped else ""
    return f"process {pid} runs a trial{how}"


def look_at(placement: Placement, share: bool) -> Before:
    """Read the state of the cards before a trial.

    Raises: InvalidInput when another process calculates on one, unless `share`."""
    others = (_others_on(card, share) for card in placement.cards)
    shared_with = ", ".join(with_whom for with_whom in others if with_whom)
    samples = [_sample(card) for card in placement.cards]
    return Before(
        used_bytes=tuple(sample.used_bytes if sample else None for sample in samples), shared_with=shared_with
    )


def _others_on(card: Card, share: bool) -> str:
    users = {pid: used for pid, used in card.users().items() if pid != os.getpid()}  # isolation=inline
    with_whom = ", ".join(_user(pid, used) for pid, used in users.items())
    if users and not share:
        raise InvalidInput(
            f"{card.name} (gpu:{card.index}) is in use by {with_whom}, so the trial's speed, memory and "
            "energy would not be its own. Wait for it, end it, choose another card with device=gpu:N, or measure "
            "anyway with share_device=true; the record will say so."
        )
    return with_whom


def temperature(placement: Placement) -> float | None:
    """Return the temperature of the warmest card in degrees Celsius; None without a reading."""
    samples = [_sample(card) for card in placement.cards]
    readings = [sample.temperature_celsius for sample in samples if sample]
    return max((celsius for celsius in readings if celsius is not None), default=None)


def see_freed(placement: Placement, before: Before, share: bool) -> tuple[tuple[int | None, ...], str]:
    """Wait until each card's memory use is what it was before the trial. With `share` other processes change it too, so
    nothing is waited for.

    Returns: bytes in use now on each card, None without a reading; and empty, or which processes still hold how
    much."""
    if share:
        return (), ""
    found = [_freed(card, used) for card, used in zip(placement.cards, before.used_bytes, strict=True)]
    return tuple(used for used, _ in found), "; ".join(held for _, held in found if held)


def _freed(card: Card, before_bytes: int | None) -> tuple[int | None, str]:
    if before_bytes is None:
        return None, ""
    end = time.monotonic() + _FREED_SECONDS
    while (sample := _sample(card)) and sample.used_bytes is not None:
        held = sample.used_bytes - before_bytes
        if held <= _SLACK_BYTES:
            return sample.used_bytes, ""
        if time.monotonic() > end:
            who = ", ".join(_user(pid, used) for pid, used in card.users().items()) or "no process that can be seen"
            said = f"{held / GIB:.2f} GiB of {card.name} were not freed after the trial; held by {who}"
            return sample.used_bytes, said
        time.sleep(0.05)
    return None, ""


def cool_down(placement: Placement, to_celsius: float | None, waiting: Callable[[str], None]) -> str:
    """Wait until no card is warmer than `to_celsius`.

    Returns: empty, or why the trial starts warmer.
    """
    if to_celsius is None:
        return ""
    found = (_cooled(card, to_celsius, waiting) for card in placement.cards)
    return "; ".join(why for why in found if why)


def _cooled(card: Card, to_celsius: float, waiting: Callable[[str], None]) -> str:
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
        pause(1.0)
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
