"""The folder multirun/, where trials and sweeps put their folders, and its link to the newest of them."""

import contextlib
import os
from pathlib import Path

from lora_lab.paths import MULTIRUN

LATEST = "latest"


def folders(root: Path = MULTIRUN) -> list[Path]:
    """Return the folders below `root` that can hold a trial or a sweep, each once."""
    # not what begins with a dot: another process's new link may be gone before it is looked into
    days = [day for day in root.glob("[!.]*") if not (day.name == LATEST and day.is_symlink())]
    return [path for day in days for path in day.glob("*")]


def point_latest(folder: Path) -> None:
    """Point multirun/latest at a folder.

    Anything but a link that the user has put there stays. A link that cannot be made is not an error."""
    link = MULTIRUN / LATEST
    if link.exists() and not link.is_symlink():
        return
    new = MULTIRUN / f".{LATEST}.{os.getpid()}"
    with contextlib.suppress(OSError):
        MULTIRUN.mkdir(exist_ok=True)
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.relpath(folder.resolve(), MULTIRUN.resolve()))
        new.replace(link)
