"""Keep working when output cannot be written: a full disk, a pipe that nobody reads, a closed terminal. Output is not
the record."""

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Sink(io.FileIO):
    """A file descriptor that leads to /dev/null from its first failed write on, for child processes too."""

    def write(self, data: "ReadableBuffer") -> int:
        """Write, or pretend to."""
        written: int | None = None  # a pipe that is full and does not block takes nothing; that is left out
        try:
            written = super().write(data)
        except OSError:
            _lead_nowhere(self.fileno())
        return memoryview(data).nbytes if written is None else written


def never_end_for_output() -> None:
    """Make writing to standard output and standard error always succeed.

    A descriptor that was closed from the start (`>&-`) is opened: the next file or pipe would get its number, and
    be written to by what prints."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _lead_nowhere(descriptor)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, sys.stderr)


def _stream(descriptor: int, before: TextIO | None) -> TextIO:
    """Return a stream like the one before whose writes succeed. A character that its encoding lacks is written as its
    number."""
    if before is not None:
        with contextlib.suppress(OSError):
            before.flush()
    interactive = os.isatty(descriptor)
    return io.TextIOWrapper(
        io.BufferedWriter(_Sink(descriptor, "w", closefd=False)),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=interactive or descriptor == 2,
        write_through=isinstance(before, io.TextIOWrapper) and before.write_through,
    )


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
