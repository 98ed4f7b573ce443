"""Read the records of a table: csv and tsv by Python's csv module, Parquet and Arrow by pyarrow."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any

from lora_lab.config import InvalidInput
from lora_lab.dataset.data_files import DataFile
from lora_lab.dataset.file_kinds import FileKind, separator_of

_BATCH_ROWS = 1000
_LONGEST_CELL = 2**31 - 1
"""Characters; Python's own limit is 131,072."""

_Records = Iterator[tuple[int, object]]


def read_cells(file: DataFile) -> _Records:
    """Read a table of text with a heading, each record with the line that it begins in. An unnamed column, as a table's
    index is written, is left out.

    Raises: InvalidInput for a heading that names a column twice, a quote that is not closed, and text that is not
    UTF-8. A line with too many cells, or too few, is an InvalidInput among the records."""
    csv.field_size_limit(_LONGEST_CELL)
    with file.opened() as opened:
        lines = _decoded(file, opened)
        heading = next(lines, "")
        separator = "\t" if ".tsv" in file.path.suffixes else separator_of(heading)

        def text() -> Iterator[str]:
            yield heading
            yield from lines

        reader = csv.reader(text(), delimiter=separator, strict=True)
        names: list[str] | None = None
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise InvalidInput(
                    f"{file.name} breaks in the row that begins at line {number} ({error}). A quote inside a quoted "
                    'cell is written twice (""), and each quote that opens is closed.'
                ) from error
            if cells is None:
                return
            if not any(cells):
                continue
            if names is None:
                names = _names(file, cells)
            elif len(cells) == len(names):
                yield number, {name: cell for name, cell in zip(names, cells, strict=True) if name}
            else:
                yield (
                    number,
                    InvalidInput(
                        f"{len(cells)} cells where the heading has {len(names)}; text that holds "
                        f"{'a tab' if separator == chr(9) else separator} must be in quotes"
                    ),
                )


def _names(file: DataFile, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if twice is not None:
        raise InvalidInput(f"{file.name}: its heading names the column {twice!a} twice. Rename one of them.")
    return names


def _decoded(file: DataFile, opened: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(opened, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            command = file.piped_to("iconv -f WINDOWS-1252 -t UTF-8")
            raise InvalidInput(
                f"{file.name} is not UTF-8 text (line {number}). Save it as UTF-8; Western European text, for example, "
                f"is converted by:\n  {command} > utf8.csv"
            ) from None


def read_columns(file: DataFile, kind: FileKind) -> _Records:
    """Read a Parquet or Arrow file, each record with its number from 1.

    Raises: InvalidInput for a file that is torn or has no columns."""
    import pyarrow

    what = "Parquet" if kind is FileKind.parquet else "Arrow"
    try:
        with file.opened() as opened:
            source = io.BytesIO(opened.read()) if file.gzipped else opened
            names, batches = _OPENERS[kind](source)
            if not names:
                raise InvalidInput(f"{file.name} is {what} without columns. Write it again, with the rows.")
            number = 0
            for batch in batches:
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).partition("\n")[0]
        raise InvalidInput(f"{file.name} is {what} that can't be read ({said}). Copy or write it again.") from error


def _parquet(source: IO[bytes]) -> tuple[list[str], Iterator[Any]]:
    from pyarrow import parquet

    found = parquet.ParquetFile(source)
    return found.schema_arrow.names, found.iter_batches(batch_size=_BATCH_ROWS)


def _arrow(source: IO[bytes]) -> tuple[list[str], Iterator[Any]]:
    from pyarrow import ipc

    found = ipc.open_file(source)
    return found.schema.names, (found.get_batch(number) for number in range(found.num_record_batches))


def _arrow_stream(source: IO[bytes]) -> tuple[list[str], Iterator[Any]]:
    from pyarrow import ipc

    found = ipc.open_stream(source)
    return found.schema.names, iter(found)


_OPENERS: dict[FileKind, Callable[[IO[bytes]], tuple[list[str], Iterator[Any]]]] = {
    FileKind.parquet: _parquet,
    FileKind.arrow: _arrow,
    FileKind.arrow_stream: _arrow_stream,
}
