"""Write files atomically: a crash or a full disk never leaves a partial file."""

import json
import os
import tempfile
from enum import Enum
from pathlib import Path
from typing import Any


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically; enums by name, as in yaml."""

    def other(value: object) -> str:
        return value.name if isinstance(value, Enum) else str(value)

    write_text(path, json.dumps(content, indent=2, default=other) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises: OSError.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something went wrong


def read_json(path: Path) -> Any:
    """Return the content of a file that write_json wrote; None when there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def lfs_pointer(path: Path) -> bool:
    """Return whether a file is only a git-lfs pointer to the real one."""
    note = b"version https://git-lfs.github.com/spec/"
    with path.open("rb") as file:
        return file.read(len(note)) == note
