"""Path of the page: next to its sweep, and never over a file that is not a lora_lab page."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from lora_lab.config import InvalidInput

MARK = ": lora_lab report</title>"
"""Part of every page's head, also in older versions."""

_STYLE = "<style>:root { --ink:"
"""How the style of every page begins: a title alone is not specific enough."""

_MARK_WITHIN = 2000
_RECORDS = ("sweep.json", "trial.json")


def choose_place(tags: Mapping[str, str], out: Path | None) -> tuple[Path, str]:
    """Choose the page's file.

    Args:
        tags: those of the newest sweep or trial. They are untrusted: any writer to the store can set them.
        out: the file that the user named.

    Returns: the file, and in words why it is not where one would look for it.

    Raises: InvalidInput if the user named a file that is not a page."""
    if out is not None:
        if not _free(out):
            raise InvalidInput(f"--out {out}: this file exists and is not a lora_lab page. Name another file.")
        return out, ""
    folder = Path(tags.get("folder", ""))
    own = folder.is_absolute() and not folder.is_symlink() and _holds(folder, tags.get("record_id", ""))
    beside = folder if own else Path()
    if _free(beside / "report.html"):
        return beside / "report.html", ""
    number = next(n for n in range(2, 10_000) if _free(Path(f"report-{n}.html")))
    return Path(f"report-{number}.html"), f"{beside / 'report.html'} is not a lora_lab page and was not overwritten"


def _holds(folder: Path, record_id: str) -> bool:
    """Return whether a folder holds the record, by its content and not by its name."""
    for name in _RECORDS:
        try:
            if not _is_plain(folder / name):
                continue
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            if record_id and found["record"]["id"] == record_id:
                return True
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return False


def _free(path: Path) -> bool:
    """Return whether writing there loses nothing: there is no file, or a page of lora_lab."""
    if not os.path.lexists(path):
        return True
    if not _is_plain(path):
        return False
    try:
        start = path.read_text(encoding="utf-8", errors="replace")[:_MARK_WITHIN]
    except OSError:
        return False
    return MARK in start and _STYLE in start


def _is_plain(path: Path) -> bool:
    """Return whether it is a regular file: not a link, and not a pipe, which would block."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False
