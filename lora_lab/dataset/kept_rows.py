"""Keep the text of many rows in a file, and in memory only what rows are compared and ordered by."""

import os
import pickle
import tempfile
from array import array
from collections.abc import Hashable
from pathlib import Path

from lora_lab.dataset.content import Mark
from lora_lab.dataset.row import Row

MOST_IN_MEMORY = 16 * 2**20
"""Bytes of rows, as pickle has them, that stay in memory; those behind them go into the file."""


class KeptRow(Mark):
    """A row whose text is read when it is asked for."""

    __slots__ = ("_file", "_held")

    def __init__(self, row: Row, file: "RowFile", held: Row | int) -> None:
        """Keep a row.

        Args:
            held: its number in the file, or the row itself where it is not in there.
        """
        super().__init__(row)
        self._file = file
        self._held = held

    @property
    def row(self) -> Row:
        """Return the row."""
        return self._file.read(self._held) if isinstance(self._held, int) else self._held


def whole(row: Hashable) -> Hashable:
    """Return a row with its text, whether it is kept or not."""
    return row.row if isinstance(row, KeptRow) else row


class RowFile:
    """A temporary file of rows, without a name: it is gone with the process. Few rows stay in memory, and so do those
    that the disk has no room for."""

    def __init__(self, folder: Path) -> None:
        """Begin without a file.

        Args:
            folder: where the file is made once it is needed.
        """
        self._folder = folder
        self._descriptor: int | None = None
        self._ends = array("q", [0])
        self._in_memory = 0
        self.rows = 0
        """Rows that were taken in."""
        self.fault: OSError | None = None
        """Why the file takes no more rows; None while it does."""

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def keep(self, row: Row) -> KeptRow:
        """Take in a row."""
        self.rows += 1
        return KeptRow(row, self, self._written(row))

    def read(self, number: int) -> Row:
        """Return a row of the file."""
        assert self._descriptor is not None
        start, end = self._ends[number], self._ends[number + 1]
        row: Row = pickle.loads(os.pread(self._descriptor, end - start, start))
        return row

    def _written(self, row: Row) -> Row | int:
        """Return the number of a row in the file, or the row where it stays in memory."""
        if self.fault is not None:
            return row
        content = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
        if self._in_memory + len(content) <= MOST_IN_MEMORY:
            self._in_memory += len(content)
            return row
        try:
            if self._descriptor is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    self._descriptor = os.dup(file.fileno())
            start = self._ends[-1]
            if os.pwrite(self._descriptor, content, start) < len(content):
                raise OSError("the disk has no room for all of a row")
        except OSError as error:
            self.fault = error
            return row
        self._ends.append(start + len(content))
        return len(self._ends) - 2
