"""Where a trial or sweep may leave its files: looked at before anything is started or written."""

import contextlib
import os
from pathlib import Path

from lora_lab.config import InvalidInput, TrackingConfig, TrackingKind
from lora_lab.paths import MULTIRUN
from lora_lab.store.sweep_folder import PLAN, SweepFolder
from lora_lab.store.trial_folder import LEFT_OVER, MANIFEST, RECORD

_ANOTHER = (
    "Give another folder with {setting}=FOLDER, or leave it out: then every {what} gets a new one below multirun/."
)


def check_working_folder() -> None:
    """Raise InvalidInput when no trial can be started from where the user stands."""
    here = Path.cwd()
    if "${" in str(here):
        raise InvalidInput(
            f"the folder you stand in, {here}, has ${{ in its name, which Hydra takes for a variable. Rename it."
        )
    if os.path.lexists(MULTIRUN) and not MULTIRUN.is_dir():
        raise InvalidInput(
            f"{here}/multirun is in the way: trials leave their files in a folder of that name, and it is "
            f"{_kind(MULTIRUN)}. Move it away, or stand in another folder."
        )


def check_chdir(chdir: object) -> None:
    """Raise InvalidInput when Hydra was asked to change into each trial's folder."""
    if chdir:
        raise InvalidInput(
            "hydra.job.chdir=true moves a trial into its own folder, where multirun, tracking.root and data.path are "
            "other places than you meant. Leave it out."
        )


def check_trial_folder(folder: Path, tracking: TrackingConfig, in_sweep: bool, planned: bool = False) -> None:
    """Raise InvalidInput for a folder that can't be this trial's alone.

    Args:
        in_sweep: Hydra runs it as a part of a sweep.
        planned: that sweep is one of ours, and gave it this folder.
    """
    setting, what = ("hydra.sweep.dir", "sweep") if in_sweep else ("hydra.run.dir", "trial")
    another = _ANOTHER.format(setting=setting, what=what)
    _check_location(folder, tracking, setting, another)
    if SweepFolder(folder.parent).exists and not planned:
        raise InvalidInput(
            f"{setting}: {folder} lies in a sweep's folder: the trial would be counted among its own. {another}"
        )
    try:
        there = sorted(entry.name for entry in os.scandir(folder)) if os.path.lexists(folder) else []
    except OSError as error:
        raise InvalidInput(
            f"{setting}: {folder} is no folder that can be read ({error.strerror}). {another}"
        ) from error
    if MANIFEST in there or RECORD in there:
        raise InvalidInput(f"{setting}: {folder} holds a trial already, and its files would be mixed. {another}")
    if PLAN in there and not in_sweep:
        raise InvalidInput(f"{setting}: {folder} holds a sweep. {another}")
    foreign = [name for name in there if name not in LEFT_OVER]
    if foreign:
        some = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise InvalidInput(f"{setting}: {folder} holds files that are no trial's ({some}). {another}")


def check_sweep_folder(folder: Path, tracking: TrackingConfig) -> None:
    """Raise InvalidInput for a folder that can't hold the folders of this sweep's trials. Files of the user's may lie
    there, since a sweep uploads by name, but nothing that is called as its trials will be."""
    another = _ANOTHER.format(setting="hydra.sweep.dir", what="sweep")
    _check_location(folder, tracking, "hydra.sweep.dir", another)
    if os.path.lexists(folder) and not folder.is_dir():
        raise InvalidInput(f"hydra.sweep.dir: {folder} is {_kind(folder)}, not a folder. {another}")
    if (folder / PLAN).is_file():
        return
    taken = [PLAN, "trials.csv", "report.html", MANIFEST, RECORD]
    taken += [path.name for path in folder.glob("[0-9][0-9][0-9][0-9]*")]
    in_the_way = sorted(name for name in taken if os.path.lexists(folder / name))
    if in_the_way:
        raise InvalidInput(
            f"hydra.sweep.dir: {folder} holds {', '.join(in_the_way[:3])}, where the sweep's own would go. {another}"
        )


def leave_empty(folder: Path) -> None:
    """Take away a folder that was made for nothing; one with files in it stays."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _check_location(folder: Path, tracking: TrackingConfig, setting: str, another: str) -> None:
    """The store takes a copy of the trial's files, so that neither may lie within the other, nor in another trial."""
    name = os.fspath(folder)
    if any(ord(character) < 32 for character in name):
        raise InvalidInput(f"{setting}={name!r} has control characters in its name. {another}")
    if "${" in name:
        raise InvalidInput(f"{setting}: {name} has ${{ in its name, which Hydra takes for a variable. {another}")
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
        return "a link that leads nowhere" if not path.exists() else "a link to something else"
    return "a file" if path.is_file() else "no folder"
