"""Keep a job's checkpoints: complete ones are found again, torn ones are removed, old ones make room.

Trainer writes a checkpoint into `checkpoints/checkpoint-N`. It is complete once it is on disk, has `complete.json` as
its last file and bears its final name, `checkpoints/NNNNNN`. Whatever else lies in the folder is torn.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_lab.files import read_json, write_json
from lora_lab.worker.trainables.trainable import Trainable

_MARK = "complete.json"
_BEST_WEIGHTS = "best_weights.safetensors"
"""In a checkpoint: the weights with the lowest held-out loss until then."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    facts: dict[str, Any]
    """What the job noted with it."""

    @property
    def total_bytes(self) -> int:
        """Return the size of all its files."""
        return sum(_sizes(self.folder).values())


class Checkpoints:
    """The checkpoints of one job, and what it has trained best."""

    def __init__(self, folder: Path, keep: int, trained: Trainable) -> None:
        """Take the trial's folder, how many complete checkpoints are kept, and what is trained."""
        self._trained = trained
        self._weights, self._config = trained.files
        self.root = folder / "checkpoints"
        self.best = folder / "best"
        self._keep = keep
        self.are_of_earlier = self.root.is_dir()
        """Whether an earlier attempt at the job had begun to train."""

    def complete(self, written: Path, step: int, facts: dict[str, Any]) -> Checkpoint:
        """Make a checkpoint of a folder that Trainer has written, then remove the oldest of too many.

        Raises: OSError."""
        if (self.best / self._weights).exists():
            _link(self.best / self._weights, written / _BEST_WEIGHTS)
        for path in written.iterdir():
            _flush(path)
        _flush(written)
        write_json(written / _MARK, {"step": step, "facts": facts, "sizes": _sizes(written)})
        _flush(written)
        final = self.root / f"{step:06d}"
        _remove(final)
        written.rename(final)
        _flush(self.root)
        self._rotate()
        return Checkpoint(final, step, facts)

    def all(self) -> list[Checkpoint]:
        """Return the complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        found = [_complete(path) for path in self.root.iterdir()]
        return sorted((each for each in found if each is not None), key=lambda each: each.step)

    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None."""
        return next(reversed(self.all()), None)

    def remove_torn(self) -> None:
        """Remove folders that are not complete checkpoints."""
        complete = {each.folder for each in self.all()}
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if path.is_dir() and path not in complete:
                _remove(path)

    def go_back_before(self, step: int) -> Checkpoint | None:
        """Remove the checkpoints of this step and later ones, and return the newest that is left; None without one,
        and then none is removed."""
        kept = [each for each in self.all() if each.step < step]
        if not kept:
            return None
        for each in self.all():
            if each not in kept:
                _remove(each.folder)
        return kept[-1]

    def save_best(self, model: Any) -> None:
        """Write what is trained of the model into `best/`.

        Raises: OSError, SafetensorError."""
        fresh = self.root / "best"
        try:
            self._trained.write(model, fresh)
            for path in fresh.iterdir():
                _flush(path)
            _remove(self.best)
            fresh.rename(self.best)
        finally:
            _remove(fresh)

    def restore_best(self, checkpoint: Checkpoint | None) -> None:
        """Make `best/` what it was at the checkpoint; nothing without one."""
        _remove(self.best)
        if checkpoint is None or not (checkpoint.folder / _BEST_WEIGHTS).exists():
            return
        self.best.mkdir()
        shutil.copy(checkpoint.folder / self._config, self.best)
        _link(checkpoint.folder / _BEST_WEIGHTS, self.best / self._weights)

    def _rotate(self) -> None:
        """Remove old checkpoints, but not that of the start: a spike is noticed some steps after it began, when all
        others may be later than its beginning."""
        for each in [each for each in self.all() if each.step > 0][: -self._keep]:
            _remove(each.folder)


def is_disk_fault(error: Exception) -> bool:
    """Return whether a file could not be written: a full disk, as a rule. torch's writer raises a RuntimeError."""
    in_writer = isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
    return isinstance(error, OSError | SafetensorError) or in_writer


def _complete(folder: Path) -> Checkpoint | None:
    """Return the checkpoint in a folder; None for one whose files are not what was written."""
    said = read_json(folder / _MARK) if folder.name.isdecimal() else None
    if not isinstance(said, dict) or _sizes(folder) != said.get("sizes"):
        return None
    return Checkpoint(folder, said["step"], said["facts"])


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file but the mark."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != _MARK}


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path, other: Path) -> None:
    """Give a file one more name; copy it where the file system has no links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copy(path, other)


def _remove(folder: Path) -> None:
    """Remove a folder. Its mark goes first, so that a kill meanwhile leaves nothing that looks complete."""
    (folder / _MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
