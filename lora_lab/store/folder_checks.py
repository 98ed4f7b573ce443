"""Check where a trial or sweep may put its files, before anything is started or written."""

import contextlib
import os
from pathlib import Path

from lora_lab.config import InvalidInput, TrackingConfig
from lora_lab.options import TrackingKind
from lora_lab.paths import MULTIRUN
from lora_lab.store.heartbeat import HEARTBEAT
from lora_lab.store.sweep_folder import PLAN, SweepFolder
from lora_lab.store.trial_folder import DELIVERED, LEFT_OVER, MANIFEST, RECORD

_ANOTHER = (
    "Give another folder with {setting}=FOLDER, or leave it out: then every {what} gets a new one below multirun/."
)


def check_working_folder() -> None:
    """Raise InvalidInput when no trial can be started from the working folder."""
    here = Path.cwd()
    if "${" in str(here):
        raise InvalidInput(
            f"the working folder {here} has ${{ in its name, which Hydra reads as a variable. Rename the folder."
        )
    if os.path.lexists(MULTIRUN) and not MULTIRUN.is_dir():
        raise InvalidInput(
            f"{here}/multirun is in the way: trials leave their files in a folder of that name, and it is "
            f"{_kind(MULTIRUN)}. Move it away, or start in another folder."
        )


def check_chdir(chdir: object) -> None:
    """Raise InvalidInput when Hydra was asked to change into each trial's folder."""
    if chdir:
        raise InvalidInput(
            "hydra.job.chdir=true runs a trial inside its own folder. There multirun, tracking.root and data.path are "
            "other places than you meant. Leave it out."
        )


def check_trial_folder(folder: Path, tracking: TrackingConfig, in_sweep: bool, planned: bool = False) -> None:
    """Raise InvalidInput when a folder cannot belong to this trial alone.

    Args:
        in_sweep: whether Hydra runs the trial as a part of a sweep.
        planned: whether lora_lab planned that sweep and chose this folder.
    """
    setting, what = ("hydra.sweep.dir", "sweep") if in_sweep else ("hydra.run.dir", "trial")
    another = _ANOTHER.format(setting=setting, what=what)
    _check_location(folder, tracking, setting, another)
    if SweepFolder(folder.parent).exists and not planned:
        raise InvalidInput(
            f"{setting}: {folder} lies in a sweep's folder, so the trial would count as one of that sweep's. {another}"
        )
    try:
        there = sorted(entry.name for entry in os.scandir(folder)) if os.path.lexists(folder) else []
    except OSError as error:
        raise InvalidInput(f"{setting}: {folder} cannot be read as a folder ({error.strerror}). {another}") from error
    if MANIFEST in there or RECORD in there:
        raise InvalidInput(
            f"{setting}: {folder} holds a trial already, and the files of both would be mixed. {another}"
        )
    if PLAN in there and not in_sweep:
        raise InvalidInput(f"{setting}: {folder} holds a sweep. {another}")
    foreign = [name for name in there if name not in (*LEFT_OVER, HEARTBEAT) and not name.startswith(".now-")]
    if foreign:
        some = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise InvalidInput(f"{setting}: {folder} holds files that do not belong to a trial ({some}). {another}")


def check_sweep_folder(folder: Path, tracking: TrackingConfig) -> None:
    """Raise InvalidInput when a folder cannot hold the folders of this sweep's trials.

    The user's own files may be there, because a sweep uploads by name. The names that the sweep needs must be free."""
    another = _ANOTHER.format(setting="hydra.sweep.dir", what="sweep")
    _check_location(folder, tracking, "hydra.sweep.dir", another)
    if os.path.lexists(folder) and not folder.is_dir():
        raise InvalidInput(f"hydra.sweep.dir: {folder} is {_kind(folder)}, not a folder. {another}")
    if (folder / PLAN).is_file():
        return
    taken = [PLAN, "trials.csv", "report.html", MANIFEST, RECORD, HEARTBEAT, DELIVERED]
    taken += [path.name for path in folder.glob("[0-9][0-9][0-9][0-9]*")]
    in_the_way = sorted(name for name in taken if os.path.lexists(folder / name))
    if in_the_way:
        raise InvalidInput(
            f"hydra.sweep.dir: {folder} holds {', '.join(in_the_way[:3])}, names that the sweep needs. {another}"
        )


def leave_empty(folder: Path) -> None:
    """Remove a folder that turned out not to be needed. A folder with files in it stays."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _check_location(folder: Path, tracking: TrackingConfig, setting: str, another: str) -> None:
    """Raise InvalidInput when a folder's name cannot be used, or the folder is inside another trial or overlaps the
    store.

    The store takes a copy of the trial's files, so neither may contain the other."""
    name = os.fspath(folder)
    if any(ord(character) < 32 for character in name):
        raise InvalidInput(f"{setting}={name!r} has control characters in its name. {another}")
    if "${" in name:
        raise InvalidInput(f"{setting}: {name} has ${{ in its name, which Hydra reads as a variable. {another}")
    for above in Path(os.path.realpath(folder)).parents:
        if all((above / one).is_file() for one in (MANIFEST, "events.jsonl")):  # either name alone may be the user's
            raise InvalidInput(f"{setting}: {folder} lies in the folder of another trial, {above}. {another}")
    if tracking.kind is not TrackingKind.local:
        return
    store, own = os.path.realpath(tracking.root), os.path.realpath(folder)
    if os.path.commonpath([store, own]) in (store, own):
        how = "is" if store == own else "lies in" if own.startswith(store) else "holds"
        raise InvalidInput(f"{setting}: {folder} {how} the MLflow store (tracking.root={tracking.root}). {another}")


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a broken link" if not path.exists() else "a link to something else"
    return "a file" if path.is_file() else "a special file"
