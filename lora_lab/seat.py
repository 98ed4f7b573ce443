"""A worker's seat among the workers that share a trial, and how far each of them has come."""

import math
import mmap
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

_ATTENDANCE, RENDEZVOUS = "attendance", "rendezvous"
"""Files of the folder where the workers meet: who has come how far, and torch's store."""

LOG, OTHERS = "worker.log", "workers"
"""In a trial's folder: what the lead prints, and the folder of what the other workers print."""

_CELL = struct.Struct("dd")


@dataclass(frozen=True, slots=True)
class Seat:
    """Which worker of how many a process is."""

    rank: int = 0
    world_size: int = 1
    meeting: Path | None = None
    """The folder where the workers meet, on this host; None for a worker alone."""

    def log(self, folder: Path) -> Path:
        """Return the file in a trial's folder that gets what the worker prints."""
        return folder / OTHERS / f"{self.rank}.log" if self.rank else folder / LOG


@contextmanager
def seats(world_size: int) -> Iterator[list[Seat]]:
    """Give the workers of a trial their seats. The folder where they meet is gone afterwards.

    It is a temporary one of this host: a trial's own folder can lie on a file system that several processes cannot map
    into memory.
    """
    if world_size == 1:
        yield [Seat()]
        return
    with TemporaryDirectory(prefix="lora_lab-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / _ATTENDANCE).write_bytes(_CELL.pack(0.0, math.inf) * world_size)
        yield [Seat(rank, world_size, Path(folder)) for rank in range(world_size)]


class Attendance:
    """How many exchanges each worker has come to, and by when it has promised to come to the next: a file that all of
    them map into memory. Writing costs nothing, and it can be read also while a worker is stopped."""

    def __init__(self, meeting: Path, world_size: int) -> None:
        """Open the file.

        Raises: OSError."""
        self._world_size = world_size
        with (meeting / _ATTENDANCE).open("r+b") as file:
            self._cells = mmap.mmap(file.fileno(), 0)

    def note(self, rank: int, exchanges: int, seconds: float = math.inf) -> None:
        """Note how many exchanges a worker has come to, and that it promises to be at the next within `seconds`; by
        default it promises nothing."""
        _CELL.pack_into(self._cells, rank * _CELL.size, float(exchanges), time.monotonic() + seconds)

    def absent(self) -> list[int]:
        """Return the workers that others wait for and that did not come when they had promised to."""
        cells, now = self._read(), time.monotonic()
        furthest = max(exchanges for exchanges, _ in cells)
        return [rank for rank, (exchanges, due) in enumerate(cells) if exchanges < furthest and now > due]

    def behind(self, exchanges: int) -> list[int]:
        """Return the workers that have come to fewer exchanges than that."""
        return [rank for rank, (come, _) in enumerate(self._read()) if come < exchanges]

    def _read(self) -> list[tuple[float, float]]:
        """Return of each worker how many exchanges it has come to, and until when the next is promised."""
        return [_CELL.unpack_from(self._cells, rank * _CELL.size) for rank in range(self._world_size)]
