"""Recognise by its first bytes what a file is: JSON, a table, Parquet or Arrow, or something else, which is named."""

import csv
import json
import re
import shlex
import stat
import zipfile
from enum import Enum
from pathlib import Path

from lora_lab.config import InvalidInput
from lora_lab.dataset.data_files import DataFile
from lora_lab.files import lfs_pointer

READABLE = "jsonl, json, csv, tsv, Parquet or Arrow, gzipped or not"
"""The kinds of file that are read."""

_HEAD_BYTES = 4096
_JSON_ENDINGS = {".json", ".jsonl", ".ndjson"}
TEXT_ENDINGS = (".txt", ".md", ".markdown", ".rst")
"""How the names of plain text end, as a rule."""

TEXT_TO_ROWS = (
    "python -c \"import json, re, sys; [print(json.dumps({'text': part})) for name in sys.argv[1:] or [0] "
    "for part in re.split(r'\\n\\s*\\n', open(name, encoding='utf-8').read().strip()) if part]\""
)
"""A command that makes a row of each paragraph of the files behind it."""

_TAR_MARK = slice(257, 262)

SEPARATORS = ",;\t"
"""What separates a table's cells: one of these."""


class FileKind(Enum):
    """What a file of records holds."""

    json = "json"
    """One object a line, or one list of objects."""
    table = "table"
    """Cells with separators between them, under a heading."""
    parquet = "parquet"
    arrow = "arrow"
    """Arrow's file format, which Feather is too."""
    arrow_stream = "arrow_stream"
    """Arrow's stream format, as save_to_disk writes it."""


_READ_BY_FIRST_BYTES = {
    b"PAR1": FileKind.parquet,
    b"ARROW1": FileKind.arrow,
    b"\xff\xff\xff\xff": FileKind.arrow_stream,
}

_SAVE_AS_CSV = "Open it, save the sheet with the rows as CSV (UTF-8), and give that file."

_OTHERS: dict[bytes, tuple[str, str]] = {
    b"BZh": ("bzip2", "Unpack it:\n  bunzip2 -k {file}"),
    b"\xfd7zXZ\0": ("xz", "Unpack it:\n  xz -dk {file}"),
    b"\x28\xb5\x2f\xfd": ("zstd", "Unpack it:\n  zstd -d {file}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it, and give the file in it:\n  7z x {file}"),
    b"\xd0\xcf\x11\xe0": ("an old Office document, perhaps a spreadsheet", _SAVE_AS_CSV),
    b"SQLite format 3\0": (
        "a SQLite database",
        "Write the table with the rows as CSV:\n  sqlite3 -csv -header {file} 'select * from TABLE' > rows.csv",
    ),
    b"\x89HDF": (
        "HDF5",
        'Convert it, for example:\n  python -c "import pandas, sys; '
        "pandas.read_hdf(sys.argv[1]).to_parquet('rows.parquet')\" {file}",
    ),
    b"%PDF": ("a PDF", "Take its text out, and write rows of it:\n  pdftotext {file}"),
    b"GGUF": ("a model's weights (GGUF), not data", "Give the file with the rows."),
}
"""What begins with these bytes, and the remedy."""

_WITHIN_ZIP = {
    "xl/workbook.xml": ("an Excel workbook", _SAVE_AS_CSV),
    "word/document.xml": ("a Word document", "Write its text as rows."),
    "content.xml": ("an OpenDocument file, perhaps a spreadsheet", _SAVE_AS_CSV),
    "data.pkl": ("a file of PyTorch's, not data", "Give the file with the rows."),
}
"""What a zip with such a file in it is, and the remedy."""

_ICONV = {
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32": "UTF-32",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
}
"""json's name for an encoding, and iconv's."""


def kind_of(file: DataFile) -> FileKind:
    """Return what a file is, by its content.

    Raises: InvalidInput, with what to type, for a file that cannot be read or is of a kind that is not."""
    _check_there(file)
    try:
        with file.opened() as opened:
            head = opened.read(_HEAD_BYTES)
        pointer = lfs_pointer(file.path)
    except OSError as error:
        raise InvalidInput(f"{file.name} can't be read ({error.strerror}). Look at its permissions.") from error
    if pointer:
        raise InvalidInput(
            f"{file.name} is a git-lfs pointer, not the file itself. In its repository, type:\n  git lfs pull"
        )
    for first, kind in _READ_BY_FIRST_BYTES.items():
        if head.startswith(first):
            return kind
    if head and not head.strip(b"\0"):
        raise InvalidInput(f"{file.name} holds nothing but NUL bytes, as a crash leaves a file. Write it again.")
    found = _other_kind(file, head)
    if found:
        what, remedy = found
        raise InvalidInput(
            f"{file.name} is {what}. The rows can be {READABLE}. "
            + remedy.replace("{file}", shlex.quote(str(file.path)))
        )
    text = _text(head)
    if _is_table(file.path, text):
        return FileKind.table
    if text and text[0] not in "{[" and not _JSON_ENDINGS & set(file.path.suffixes):
        has_paragraphs = re.search(r"\n\s*\n", text.rstrip()) is not None
        unit, program = ("paragraph", TEXT_TO_ROWS) if has_paragraphs else ("line", "jq -Rc '{text: .}'")
        raise InvalidInput(
            f"{file.name} is plain text, neither JSON nor a table. Make a row of each {unit}, and give rows.jsonl "
            f"instead:\n  {file.piped_to(program)} > rows.jsonl"
        )
    return FileKind.json


def separator_of(heading: str) -> str:
    """Return the character that separates the cells of a table with this first line."""
    return max(SEPARATORS, key=heading.count)


def _check_there(file: DataFile) -> None:
    """Raise InvalidInput unless it is a regular file."""
    try:
        mode = file.path.stat().st_mode
    except (OSError, ValueError):
        is_pattern = any(mark in str(file.path) for mark in "*?")
        advice = "A pattern finds no files: give the folder, which is read whole." if is_pattern else "Check its name."
        raise InvalidInput(f"{file.name}: there is no such file or folder (looked in {Path.cwd()}). {advice}") from None
    if not stat.S_ISREG(mode):
        raise InvalidInput(
            f"{file.name} is a pipe or a device. It is read more than once: save its content as a file first."
        )


def _other_kind(file: DataFile, head: bytes) -> tuple[str, str] | None:
    """Return what the file is and what to do about it; None for what may be JSON or a table."""
    for first, found in _OTHERS.items():
        if head.startswith(first):
            return found
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_kind(file.path)
    if head[_TAR_MARK] == b"ustar":
        return "a tar archive", "Unpack it into a folder, and give that:\n  mkdir rows && tar xf {file} -C rows"
    if _text(head)[:5].lower() in ("<html", "<!doc"):
        return "a web page", "Where a site shows a file, the file's own address is often the one named raw."
    encoding = _ICONV.get(json.detect_encoding(head))
    if encoding:
        return f"{encoding} text", f"Convert it:\n  iconv -f {encoding} -t UTF-8 {{file}} > rows{file.path.suffix}"
    return None


def _zip_kind(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):  # gzipped as well, or torn
        return "a damaged zip archive", "Copy it again."
    for mark, found in _WITHIN_ZIP.items():
        if any(name == mark or name.endswith(f"/{mark}") for name in names):
            return found
    return "a zip archive", "Unpack it into a folder, and give that:\n  unzip {file} -d rows"


def _text(head: bytes) -> str:
    return head.decode("utf-8-sig", errors="replace").lstrip()


def _is_table(path: Path, text: str) -> bool:
    """Return whether text under this name is a table. JSON that is misnamed is none, nor is a sentence with a comma."""
    if not text or text[0] in "{[":
        return False
    if {".csv", ".tsv"} & set(path.suffixes):
        return True
    heading = text.partition("\n")[0]
    cells = next(csv.reader([heading], delimiter=separator_of(heading)), [])
    return len(cells) > 1 and all(re.fullmatch(r"\w[\w.-]*", cell.strip()) for cell in cells)
