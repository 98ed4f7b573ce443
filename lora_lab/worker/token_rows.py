"""Rows as tokens, outside Python's heap: four bytes a token, in memory while they are few and otherwise in a file."""

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_lab.worker.example import IGNORED, Example

MOST_IN_MEMORY = 64 * 2**20
"""Bytes of tokens that are collected before a file is begun."""

_AT_ONCE = 2**20
"""Bytes of tokens that are added to the file at once."""

_TOKEN_BYTES = 4

_BEGIN, _SIZE, _LENGTH, _TRAINED = range(4)
"""What is known of a row: its first token's place, its tokens, its tokens before it was cut, and how many of its tokens
are predicted."""


class TokenFile:
    """The tokens of a file, of which only what is asked for is read. It can be removed meanwhile."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises: OSError."""
        self._descriptor = os.open(path, os.O_RDONLY)
        self._count = os.fstat(self._descriptor).st_size // _TOKEN_BYTES

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> NDArray[np.int32]:
        """Return the tokens from one place to another.

        Raises: OSError when the file was cut meanwhile."""
        start, end, _ = part.indices(self._count)
        content = os.pread(self._descriptor, (end - start) * _TOKEN_BYTES, start * _TOKEN_BYTES)
        if len(content) < (end - start) * _TOKEN_BYTES:
            raise OSError("the file of tokens was cut while it was used. Start the trial again.")
        return np.frombuffer(content, np.int32)


class TokenRows(Sequence[Example]):
    """Rows in an order of their own, of tokens that they share with other orders.

    A token that is trained is kept as its id; one that is only read as the complement of its id, which is negative."""

    def __init__(self, tokens: NDArray[np.int32] | TokenFile, table: NDArray[np.int64]) -> None:
        """Take the tokens and what is known of the rows, of shape (rows, 4)."""
        self.tokens = tokens
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        begin, size, length, _ = self.table[place].tolist()
        part = self.tokens[begin : begin + size]
        read = part < 0
        return Example(
            ids=np.where(read, ~part, part).tolist(),
            labels=np.where(read, IGNORED, part).tolist(),
            truncated=length > size,
        )

    def chosen(self, places: Any) -> "TokenRows":
        """Return some of the rows, in the order of `places`: numbers, or a mask."""
        return TokenRows(self.tokens, self.table[places])

    @property
    def highest(self) -> int:
        """Return the highest id of all tokens, also of those in other rows than these; -1 without any."""
        parts = (self.tokens[start : start + _AT_ONCE] for start in range(0, len(self.tokens), _AT_ONCE))
        return max((int(np.maximum(part, ~part).max()) for part in parts), default=-1)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return the tokens of each row."""
        return self.table[:, _SIZE]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each row before it was cut."""
        return self.table[:, _LENGTH]

    @property
    def trained(self) -> NDArray[np.int64]:
        """Return how many tokens of each row are predicted."""
        return self.table[:, _TRAINED]


class TokenWriter:
    """Collects rows as tokens."""

    def __init__(self, file: Path | None) -> None:
        """Begin in memory.

        Args:
            file: where the tokens go once they are many; None to keep all of them in memory.
        """
        self._path = file
        self._file: IO[bytes] | None = None
        self._memory = bytearray()
        self._table = array("q")
        self._count = 0
        self.fault: OSError | None = None
        """Why the file could not be written; all tokens are in memory then."""

    def append(self, row: Example, length: int) -> None:
        """Add a row.

        Args:
            length: its tokens before it was cut.
        """
        ids, labels = np.array(row.ids, np.int32), np.array(row.labels, np.int32)
        self._memory += np.where(labels == IGNORED, ~ids, ids).tobytes()
        self._table.extend((self._count, len(ids), length, row.trained))
        self._count += len(ids)
        if len(self._memory) > (MOST_IN_MEMORY if self._file is None else _AT_ONCE):
            self._flush()

    def finished(self) -> TokenRows:
        """Return all rows, from the file where there is one."""
        self._flush()
        if self._file is not None and self._path is not None:
            self._file.close()
            self._file = None
            tokens: NDArray[np.int32] | TokenFile = TokenFile(self._path)
        else:
            tokens = np.frombuffer(self._memory, np.int32)
        return TokenRows(tokens, np.frombuffer(self._table, np.int64).reshape(-1, 4))

    def close(self) -> None:
        """Close the file of a writer that is not finished."""
        if self._file is not None:
            self._file.close()

    def _flush(self) -> None:
        """Move the tokens from memory into the file. Where it takes no more, they come back into memory."""
        if self._path is None or self.fault is not None:
            return
        try:
            if self._file is None:
                self._file = self._path.open("wb", buffering=0)
            written = self._path.stat().st_size
            if self._file.write(self._memory) < len(self._memory):
                raise OSError("the disk has no room for all of the tokens")
            self._memory.clear()
        except OSError as error:
            self.fault = error
            if self._file is not None:
                self._file.close()
                self._file = None
                self._memory = bytearray(self._path.read_bytes()[:written]) + self._memory
