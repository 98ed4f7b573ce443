"""A file that is written one line at a time, each before the next thing happens."""

import contextlib
import os
from pathlib import Path


class Journal:
    """A file of lines.

    A full disk does not stop the trial. What does not fit is kept in memory, and written as soon as there is room. The
    lines on disk are not in memory: a job of hours has too many."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w+b", buffering=0)
        self._pending = bytearray()

    def add(self, line: str) -> None:
        """Add a line. Never raise."""
        self._pending += line.encode("utf-8", "backslashreplace") + b"\n"
        with contextlib.suppress(OSError):
            self._write()

    def read(self) -> bytes:
        """Return everything that was added, also of a file that was removed meanwhile.

        Raises: OSError."""
        found, descriptor = bytearray(), self._file.fileno()
        while piece := os.pread(descriptor, 2**24, len(found)):
            found += piece
        return bytes(found + self._pending)

    def complete(self) -> None:
        """Write what did not fit before, and close the file.

        Raises: OSError when it still does not fit."""
        try:
            self._write()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file. Never raise."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        """Raise OSError for what does not fit; what does is written."""
        while self._pending:
            written = self._file.write(bytes(self._pending))
            del self._pending[:written]
