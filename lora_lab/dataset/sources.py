"""Read the rows that a config names: from one path, from the hub, or from several sources with weights."""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig, SourceConfig
from lora_lab.dataset.content import by_content, row_digest
from lora_lab.dataset.data_files import DataFile
from lora_lab.dataset.file_kinds import FileKind, kind_of
from lora_lab.dataset.folders import files_of_folder
from lora_lab.dataset.hub_rows import HubSplit, hub_files, hub_records
from lora_lab.dataset.json_records import Numbered, read_json
from lora_lab.dataset.row import Row
from lora_lab.dataset.rows import BrokenRecords, rows_of
from lora_lab.dataset.shipped import shipped_file, shipped_names
from lora_lab.dataset.table_records import read_cells, read_columns
from lora_lab.options import DataSource

_Kept = TypeVar("_Kept", bound=Hashable)

_SOURCE, _HELDOUT = "data.sources.path", "data.heldout_path"
"""What messages call these files by; the others by data.path."""


@dataclass(frozen=True, slots=True)
class Found(Generic[_Kept]):
    """Rows that were read, and what the user should know of them."""

    rows: list[_Kept]
    remarks: list[str] = field(default_factory=list)
    empty: int = 0
    """Rows of a data set on the hub that have no answer and are left out (alpaca has some)."""


def file_rows(data: DataConfig) -> Found[Row]:
    """Read the rows that a config names, with their text.

    Raises: InvalidInput for whatever cannot be read, naming file and line."""
    return read_rows(data, _as_it_is)


def read_rows(data: DataConfig, keep: Callable[[Row], _Kept]) -> Found[_Kept]:
    """Read the rows of `data.path`, of `data.sources`, of a data set on the hub or the shipped ones.

    Args:
        keep: makes of each row what stays in memory.

    Raises: InvalidInput for whatever cannot be read, naming file and line."""
    if data.source is DataSource.shipped:
        return Found([*map(keep, _rows_of_file(DataFile(shipped_file(data.path)), data, data.rows))])
    if data.source is DataSource.hub:
        return _rows_of_hub(_hub_split(data), data, data.rows, keep)
    if data.sources:
        return _mixed(data, keep)
    return _rows_of_path(str(data.path), data.split, "data.path", data, data.rows, keep)


def heldout_rows(data: DataConfig, keep: Callable[[Row], _Kept]) -> Found[_Kept]:
    """Read the rows of `data.heldout_path`.

    Raises: InvalidInput."""
    try:
        return _rows_of_path(str(heldout_file(data)), None, _HELDOUT, data, None, keep)
    except BrokenRecords as broken:
        raise InvalidInput(
            *broken.args,
            "Held-out rows are read as the rows to train on are: by the same data.layout and the same data.map. Give a "
            "file with the same columns.",
        ) from broken


def needs_hub(data: DataConfig) -> bool:
    """Return whether rows come from a data set on the hub."""
    return data.source is DataSource.hub or any(each.id is not None for each in data.sources)


def read_records(file: DataFile) -> tuple[Numbered, str]:
    """Return a file's records with their numbers, and what a number counts: line or row.

    Raises: InvalidInput when the file is of a kind that is not read."""
    kind = kind_of(file)
    if kind is FileKind.json:
        return read_json(file), "line"
    if kind is FileKind.table:
        return read_cells(file), "line"
    return read_columns(file, kind), "row"


def files_of_path(path: Path, split: str | None, key: str) -> tuple[list[DataFile], str]:
    """Return the files that a path names, and what the user should know of a folder's splits.

    Raises: InvalidInput."""
    if _is_folder(path):
        return files_of_folder(path, split, key)
    if split is not None:
        raise InvalidInput(
            f"{key}={path} is a file, which has no splits. Leave data.split={split} out; it chooses a part of a folder "
            "or of a data set on the hub."
        )
    return [DataFile(path, key)], ""


def files_of(data: DataConfig) -> list[DataFile]:
    """Return every file that rows are read from.

    Raises: InvalidInput for a folder that is no data set."""
    if data.source is DataSource.shipped:
        files = [DataFile(shipped_file(data.path))]
    elif data.sources:
        paths = [(each.path, each.split) for each in data.sources if each.path is not None]
        files = [file for path, split in paths for file in files_of_path(Path(path), split, _SOURCE)[0]]
    elif data.source is DataSource.hub:
        files = []
    else:
        files, _ = files_of_path(Path(str(data.path)), data.split, "data.path")
    if data.heldout_path is not None:
        files = [*files, *files_of_path(heldout_file(data), None, _HELDOUT)[0]]
    return files


def content_files(data: DataConfig) -> list[Path]:
    """Return every file that rows are read from; of data sets on the hub those of the package datasets.

    Raises: InvalidInput for a folder that is no data set, and a data set that could not be loaded."""
    asked = [_hub_split(data)] if data.source is DataSource.hub else [*filter(None, map(_source_split, data.sources))]
    return [*(file.path for file in files_of(data)), *(path for each in asked for path in hub_files(each))]


def heldout_file(data: DataConfig) -> Path:
    """Return where the held-out rows are: for shipped rows it may be a shipped file."""
    name = str(data.heldout_path)
    return shipped_file(name) if data.source is DataSource.shipped and name in shipped_names() else Path(name)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # no file can have this name
        return False


def _as_it_is(row: Row) -> Row:
    return row


def _rows_of_path(
    path: str, split: str | None, key: str, data: DataConfig, limit: int | None, keep: Callable[[Row], _Kept]
) -> Found[_Kept]:
    files, remark = files_of_path(Path(path), split, key)
    rows: list[_Kept] = []
    for file in files:
        if limit is None or len(rows) < limit:
            rows += map(keep, _rows_of_file(file, data, None if limit is None else limit - len(rows)))
    if not rows:
        raise InvalidInput(f"{key}={path} is empty; it needs rows, for example one JSON object per line.")
    return Found(rows, [remark] if remark else [])


def _rows_of_file(file: DataFile, data: DataConfig, limit: int | None) -> Iterator[Row]:
    records, unit = read_records(file)
    return rows_of(records, data, file.name, unit, limit)


def _rows_of_hub(asked: HubSplit, data: DataConfig, limit: int | None, keep: Callable[[Row], _Kept]) -> Found[_Kept]:
    records = hub_records(asked, data, limit)
    name = f"{asked.key}={asked.id}"
    rows = [*map(keep, rows_of(enumerate(records, start=1), data, name, "row", leave_out_empty=True))]
    return Found(rows, empty=len(records) - len(rows))


def _hub_split(data: DataConfig) -> HubSplit:
    return HubSplit(str(data.id), data.config, data.revision, data.split, "data.id")


def _source_split(source: SourceConfig) -> HubSplit | None:
    if source.id is None:
        return None
    return HubSplit(source.id, source.config, source.revision, source.split, "data.sources.id")


def _rows_of_source(source: SourceConfig, data: DataConfig, keep: Callable[[Row], _Kept]) -> Found[_Kept]:
    asked = _source_split(source)
    if asked is None:
        return _rows_of_path(str(source.path), source.split, _SOURCE, data, None, keep)
    found = _rows_of_hub(asked, data, None, keep)
    if not found.rows:
        raise InvalidInput(f"data.sources.id={source.id} has no row with an answer. Leave it out, or use another.")
    without = f"data.sources.id={source.id}: {found.empty} row(s) without an answer are left out"
    return Found(found.rows, [without] if found.empty else [])


def _mixed(data: DataConfig, keep: Callable[[Row], _Kept]) -> Found[_Kept]:
    """Draw the rows of each source by its weight, as many as the scarcest source allows, and no row twice.

    Which rows are drawn and their order depend on their content alone. They are not drawn by the order that rows are
    held out by: a source of which few rows are drawn would then be held out more than others."""
    _check_different(data.sources)
    found = [_rows_of_source(each, data, keep) for each in data.sources]
    remarks = [remark for each in found for remark in each.remarks]
    counts = shares([len(each.rows) for each in found], [each.weight for each in data.sources], data.rows)
    drawn = [row for each, count in zip(found, counts, strict=True) for row in _drawn(each.rows, count)]
    used = (
        f"{count:,} of {len(each.rows):,} rows of {source.name}"
        for source, each, count in zip(data.sources, found, counts, strict=True)
    )
    unused = [source.name for source, count in zip(data.sources, counts, strict=True) if not count]
    if unused:
        raise InvalidInput(
            f"data.sources: no row of {', '.join(unused)} would be used, so small is its share of the rows that there "
            "are. Use a larger weight, more rows of the others, or leave it out."
        )
    remarks.append(f"data.sources: {'; '.join(used)} are used")
    return Found(by_content(drawn), remarks)


def _drawn(rows: Sequence[_Kept], count: int) -> list[_Kept]:
    return sorted(rows, key=lambda row: hashlib.sha256(b"drawn" + row_digest(row)).digest())[:count]


def shares(counts: list[int], weights: list[float | None], limit: int | None) -> list[int]:
    """Return how many rows of each source are used: all of them without weights, else as many as the weights allow
    while none is repeated. At most `limit` together."""
    known = [weight if weight is not None else count for count, weight in zip(counts, weights, strict=True)]
    total = min(count / weight for count, weight in zip(counts, known, strict=True)) * sum(known)
    total = min(total, limit) if limit is not None else total
    return [int(total * weight / sum(known) + 1e-9) for weight in known]


def _check_different(sources: list[SourceConfig]) -> None:
    (twice, count), *_ = Counter(map(_place, sources)).most_common(1)
    if count > 1:
        raise InvalidInput(f"data.sources names {twice[0]} {count} times, and no row is used twice. Name it once.")


def _place(source: SourceConfig) -> tuple[str | Path, str | None, str | None, str | None]:
    where = source.id if source.path is None else Path(source.path).resolve()
    return where or "", source.split, source.config, source.revision
