"""A file of records as it was named by the user, opened the same way whether it is gzipped or not."""

import gzip
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from lora_lab.config import InvalidInput

GZIP = b"\x1f\x8b"
"""The first bytes of a gzipped file."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of records."""

    path: Path
    key: str = "data.path"
    """The setting that named it, or the folder that holds it."""

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return f"{self.key}={self.path}"

    @property
    def gzipped(self) -> bool:
        """Return whether its content begins as gzip's does, whatever its name is."""
        with self.path.open("rb") as file:
            return file.read(len(GZIP)) == GZIP

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open its content, unpacked.

        Raises: InvalidInput when the gzip is damaged; OSError."""
        with cast(IO[bytes], gzip.open(self.path)) if self.gzipped else self.path.open("rb") as file:
            try:
                yield file
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InvalidInput(
                    f"{self.name} is gzip that breaks off or is damaged ({error}). Copy or pack it again."
                ) from error

    def piped_to(self, program: str) -> str:
        """Return a shell command that runs `program` on its content."""
        path = shlex.quote(str(self.path))
        return f"gunzip -c {path} | {program}" if self.gzipped else f"{program} {path}"
