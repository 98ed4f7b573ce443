"""Cache the tokens of large data sets between trials, in the project's cache folder below `tokens/`.

An entry is written aside and renamed when it is whole. Every entry can be removed at any time: a process that reads it
has it open.
"""

import contextlib
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lab.files import read_json, write_json
from lora_lab.paths import cache_folder
from lora_lab.worker.token_rows import TokenFile

MOST_BYTES = 10 * 10**9
"""Of all entries; those that were not used for longest are removed beyond that."""

TOKENS = "tokens.int32"
_TABLES, _FACTS = "rows.npz", "facts.json"
_ABANDONED_SECONDS = 24 * 3600.0


def tokens_folder() -> Path:
    """Return where the tokens are cached."""
    return cache_folder() / "tokens"


def load(key: str) -> tuple[TokenFile, dict[str, NDArray[np.int64]], dict[str, Any]] | None:
    """Return the tokens, tables and facts of an entry; None where there is none that is whole."""
    entry = tokens_folder() / key
    stored = read_json(entry / _FACTS)
    try:
        sizes, facts = stored["sizes"], stored["facts"]
        if any((entry / name).stat().st_size != size for name, size in sizes.items()):
            return None
        with np.load(entry / _TABLES) as opened:
            tables = {name: opened[name] for name in opened.files}
        tokens = TokenFile(entry / TOKENS)
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
    with contextlib.suppress(OSError):  # another user's
        os.utime(entry / _FACTS)
    return tokens, tables, facts


@contextlib.contextmanager
def aside() -> Iterator[Path]:
    """Give a folder to write an entry into. It is gone afterwards unless `store` gave it its name.

    Raises: OSError when none can be made."""
    tokens_folder().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".", dir=tokens_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def store(folder: Path, key: str, tables: dict[str, NDArray[np.int64]], facts: dict[str, Any]) -> None:
    """Complete an entry whose tokens lie in a folder from `aside`, and remove entries beyond MOST_BYTES.

    Raises: OSError."""
    np.savez(folder / _TABLES, **tables)  # type: ignore[arg-type]  # numpy takes any names
    for name in (TOKENS, _TABLES):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    sizes = {name: (folder / name).stat().st_size for name in (TOKENS, _TABLES)}
    write_json(folder / _FACTS, {"sizes": sizes, "facts": facts})
    entry = tokens_folder() / key
    if load(key) is None:  # there may be a damaged one
        shutil.rmtree(entry, ignore_errors=True)
        folder.chmod(0o755)  # other users of a shared cache read it; mkdtemp lets nobody
        folder.rename(entry)
    with contextlib.suppress(OSError):  # other processes remove entries too
        _remove_oldest(key)


def _remove_oldest(newest: str) -> None:
    """Remove what is beyond MOST_BYTES, the newest entry never, and what a killed process left."""
    used: list[tuple[float, int, Path]] = []
    for entry in tokens_folder().iterdir():
        status = [file.stat() for file in entry.iterdir()] if entry.is_dir() else []
        last = max((each.st_mtime for each in status), default=0.0)
        if not entry.name.startswith("."):
            used.append((last if entry.name != newest else time.time(), sum(each.st_size for each in status), entry))
        elif time.time() - last > _ABANDONED_SECONDS and status:
            shutil.rmtree(entry, ignore_errors=True)
    total = 0
    for place, (_, size, entry) in enumerate(sorted(used, reverse=True)):
        total += size
        if place and total > MOST_BYTES:
            shutil.rmtree(entry, ignore_errors=True)
