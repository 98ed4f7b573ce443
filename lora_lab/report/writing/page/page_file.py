"""Where the page goes: next to its sweep, and never over a file that is no page of ours."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from lora_lab.config import InvalidInput

MARK = ": lora_lab report</title>"
"""Stands in every page's head, also of older versions."""

_STYLE = "<style>:root { --ink:"
"""How the style of every page begins: a title alone could be anybody's."""

_MARK_WITHIN = 2000
_RECORDS = ("sweep.json", "trial.json")


def choose_place(tags: Mapping[str, str], out: Path | None) -> tuple[Path, str]:
    """Choose the page's file.

    Args:
        tags: those of the newest sweep or trial. Anybody who writes to the store can set them.
        out: the file that the user named.

    Returns: the file, and in words why it is not where one would look for it.

    Raises: InvalidInput when the user named a file that is no page."""
    if out is not None:
        if not _free(out):
            raise InvalidInput(f"--out {out}: there is a file that is no page of lora_lab's. Name another one.")
        return out, ""
    folder = Path(tags.get("folder", ""))
    own = folder.is_absolute() and not folder.is_symlink() and _holds(folder, tags.get("record_id", ""))
    beside = folder if own else Path()
    if _free(beside / "report.html"):
        return beside / "report.html", ""
    number = next(n for n in range(2, 10_000) if _free(Path(f"report-{n}.html")))
    return Path(f"report-{number}.html"), f"{beside / 'report.html'} is no page of lora_lab's and was left as it is"


def _holds(folder: Path, record_id: str) -> bool:
    """Whether a folder is that of the record: what it says itself is compared, not its name."""
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
    """Whether nothing is lost by writing there: no file, or a page of ours."""
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
    """Whether it is a file itself: no link, and no pipe, which would be waited for."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False
