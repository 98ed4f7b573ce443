"""Choose among the rows that were read: drop duplicates, and keep a file of held-out rows apart."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig
from lora_lab.dataset.content import Mark, by_content, is_passage
from lora_lab.dataset.data_files import DataFile
from lora_lab.dataset.duplicates import without_duplicates
from lora_lab.dataset.row import Row
from lora_lab.dataset.sources import Found, files_of, heldout_rows, needs_hub, read_rows
from lora_lab.dataset.split import check_row_count
from lora_lab.options import Duplicates

_Kept = TypeVar("_Kept", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Selected(Generic[_Kept]):
    """The rows that are used, and what was counted on the way."""

    rows: list[_Kept]
    heldout: list[_Kept] = field(default_factory=list)
    """The rows of `data.heldout_path`; empty where the held-out rows are split off `rows`."""
    repeated: int = 0
    near_repeated: int | None = None
    dropped: int = 0
    """Duplicates that are not used."""
    in_both: int = 0
    """Rows that are not trained on because the file of held-out rows has them too."""
    remarks: list[str] = field(default_factory=list)


def select(data: DataConfig, rows: Sequence[_Kept], of_file: Found[_Kept] | None = None) -> Selected[_Kept]:
    """Apply `data.duplicates` and `data.heldout_path`.

    Args:
        of_file: the rows of `data.heldout_path`.

    Raises: InvalidInput when the held-out rows are laid out otherwise than all rows to train
    on, or leave nothing to train on."""
    kept, apart, remarks = list(rows), list[_Kept](), list[str]()
    if of_file is not None:
        _check_layouts(rows, of_file.rows, data)
        apart, remarks = by_content(of_file.rows), of_file.remarks
        kept = _without(kept, apart)
        if not kept:
            raise InvalidInput(
                f"data.heldout_path={data.heldout_path} holds every row of the data, so that none is left to train on. "
                "Give a file of other rows, or leave data.heldout_path out: then data.holdout splits them."
            )
    twice = len(apart) - len(set(apart))
    if data.duplicates is not Duplicates.keep:
        apart = list(dict.fromkeys(apart))
    distinct = without_duplicates(kept, data.duplicates, apart)
    return Selected(
        rows=distinct.rows,
        heldout=apart,
        repeated=distinct.repeated + twice,
        near_repeated=distinct.near_repeated,
        dropped=distinct.dropped + (0 if data.duplicates is Duplicates.keep else twice),
        in_both=len(rows) - len(kept),
        remarks=remarks,
    )


def _check_layouts(rows: Sequence[Hashable], heldout: Sequence[Hashable], data: DataConfig) -> None:
    """Raise InvalidInput when held-out rows are laid out otherwise than all rows to train on."""
    trained, asked = ({is_passage(row) for row in each} for each in (rows, heldout))
    for kind in asked - trained:
        what, others = ("plain text", "conversations") if kind else ("conversations", "plain text")
        raise InvalidInput(
            f"data.heldout_path={data.heldout_path} holds {what}, and the rows to train on are {others}. Give "
            f"held-out rows that are {others} too, or leave data.heldout_path out: then data.holdout splits the "
            "rows."
        )


def check_rows(data: DataConfig, needed: int) -> None:
    """Read the rows of files, and check that they are enough; near duplicates are not looked for, and no data set on
    the hub is read.

    Args:
        needed: the rows of one optimizer step.

    Raises: InvalidInput."""
    if needs_hub(data):
        return
    key = f"{data} {[_state(file) for file in files_of(data)]}"
    if key not in _COUNTED:
        _COUNTED[key] = _counts(data)
    count, heldout = _COUNTED[key]
    if heldout is None:
        check_row_count(count, data.holdout, needed)
    else:
        check_left(count, heldout, needed)


_COUNTED: dict[str, tuple[int, int | None]] = {}
"""By config and state of the files: the points of a sweep read their rows once."""


def _state(file: DataFile) -> tuple[Path, int, int]:
    """Return what changes when a file does; nothing for one that cannot be looked at, which reading will name."""
    try:
        status = file.path.stat()
    except (OSError, ValueError):
        return file.path, 0, 0
    return file.path, status.st_size, status.st_mtime_ns


def _counts(data: DataConfig) -> tuple[int, int | None]:
    """Count the rows to train on, and those of data.heldout_path where there is one."""
    if data.duplicates is Duplicates.keep and data.heldout_path is None:
        return len(read_rows(data, _nothing_of).rows), None
    rows = read_rows(data, Mark).rows
    if data.duplicates is not Duplicates.keep:
        rows = list(dict.fromkeys(rows))
    if data.heldout_path is None:
        return len(rows), None
    heldout = heldout_rows(data, Mark).rows
    _check_layouts(rows, heldout, data)
    return len(_without(rows, heldout)), len(heldout)


def _nothing_of(_: Row) -> None:
    """Keep nothing of a row: it is only counted."""


def check_left(count: int, heldout: int, needed: int, which: str = "rows") -> None:
    """Raise InvalidInput unless `count` rows besides those of data.heldout_path fill one optimizer step, and it has
    some."""
    if not heldout:
        raise InvalidInput(f"data.heldout_path holds no {which}. Give another file, or leave it out.")
    if not count:
        raise InvalidInput(
            f"data.heldout_path holds all {which} of the data, so none is left to train on. Give a file of other rows, "
            "or leave data.heldout_path out: then data.holdout splits them."
        )
    if count < needed:
        raise InvalidInput(
            f"the data has {count} {which} that data.heldout_path does not hold, but one step needs {needed} "
            "(batch_size x grad_accum_steps x workers). Use more rows or a smaller batch_size."
        )


def _without(rows: Sequence[_Kept], apart: Sequence[_Kept]) -> list[_Kept]:
    there = set(apart)
    return [row for row in rows if row not in there]
