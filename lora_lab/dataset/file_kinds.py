"""Recognise, by its first bytes, a file that was given as rows and is not jsonl; say what to type instead."""

import json
import shlex
import stat
from pathlib import Path

from lora_lab.config import InvalidInput
from lora_lab.files import lfs_pointer

_HEAD_BYTES = 4096

_BY_PANDAS = (
    "python -c \"import pandas, sys; pandas.{read}.to_json('rows.jsonl', orient='records', lines=True)\" {{file}}"
)
_SPREADSHEET = _BY_PANDAS.format(read="read_excel(sys.argv[1], dtype=str, keep_default_na=False)")

_BY_FIRST_BYTES: dict[bytes, tuple[str, str]] = {
    b"\x1f\x8b": ("gzip", "gunzip -c {file} > rows.jsonl"),
    b"BZh": ("bzip2", "bunzip2 -c {file} > rows.jsonl"),
    b"\xfd7zXZ\0": ("xz", "xz -dc {file} > rows.jsonl"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc {file} > rows.jsonl"),
    b"PK\x03\x04\x14\0\x06\0": ("an Office document, perhaps a spreadsheet", _SPREADSHEET),
    b"PK\x03\x04": ("a zip archive (a spreadsheet is one too)", "unzip {file}"),
    b"PK\x05\x06": ("an empty zip archive", "unzip -l {file}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x {file}"),
    b"PAR1": ("Parquet", _BY_PANDAS.format(read="read_parquet(sys.argv[1])")),
    b"ARROW1": ("Arrow", _BY_PANDAS.format(read="read_feather(sys.argv[1])")),
    b"\xff\xff\xff\xff": (
        "an Arrow stream, as the package datasets keeps them",
        "python -c \"import datasets, sys; datasets.Dataset.from_file(sys.argv[1]).to_json('rows.jsonl')\" {file}",
    ),
    b"SQLite format 3\0": (
        "a SQLite database",
        "sqlite3 -json {file} 'select * from TABLE' | jq -c '.[]' > rows.jsonl",
    ),
    b"\x89HDF": ("HDF5", _BY_PANDAS.format(read="read_hdf(sys.argv[1])")),
    b"%PDF": ("a PDF", "pdftotext {file}"),
}

_ICONV = {
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32": "UTF-32",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
}
"""json's name for an encoding, and iconv's."""


def check_file_kind(path: Path) -> None:
    """Raise InvalidInput, with what to type, unless `path` is a file that begins as text in UTF-8 and is no table."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        mode = 0
    if stat.S_ISDIR(mode):
        raise InvalidInput(f"data.path={path}: there is no such file; it is a folder. Give the jsonl file in it.")
    if mode == 0:
        raise InvalidInput(f"data.path={path}: there is no such file (looked in {Path.cwd()}). Give a jsonl file.")
    if not stat.S_ISREG(mode):
        raise InvalidInput(
            f"data.path={path} is a pipe or a device. It is read more than once: save its content as a file first."
        )
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        pointer = lfs_pointer(path)
    except OSError as error:
        raise InvalidInput(f"data.path={path} can't be read ({error.strerror}). Look at its permissions.") from error
    if pointer:
        raise InvalidInput(
            f"data.path={path} is a git-lfs pointer, not the file itself. In its repository, type:\n  git lfs pull"
        )
    if head and not head.strip(b"\0"):
        raise InvalidInput(f"data.path={path} holds nothing but NUL bytes, as a crash leaves a file. Write it again.")
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text[:5].lower() in ("<html", "<!doc"):
        raise InvalidInput(
            f"data.path={path} is a web page. Where a site shows a file, its own address is often the one named raw."
        )
    found = _other_kind(path.suffix, head, text)
    if found:
        what, command = found
        raise InvalidInput(
            f"data.path={path} is {what}, not one JSON object a line. Convert it, for example:\n"
            f"  {command.format(file=shlex.quote(str(path)))}"
        )


def _other_kind(suffix: str, head: bytes, text: str) -> tuple[str, str] | None:
    """Return what the file is and the command that turns it into jsonl; None for what may be jsonl."""
    for first, found in _BY_FIRST_BYTES.items():
        if head.startswith(first):
            return found
    encoding = _ICONV.get(json.detect_encoding(head))
    if encoding:
        return f"{encoding} text", f"iconv -f {encoding} -t UTF-8 {{file}} > rows.jsonl"
    heading = text.partition("\n")[0]
    separator = max(",;\t", key=heading.count)
    cells = {cell.strip().strip('"') for cell in heading.split(separator)}
    if text[:1] not in ("{", "[") and (suffix in (".csv", ".tsv") or {"instruction", "output"} <= cells):
        options = f"sep={separator!r}, dtype=str, keep_default_na=False"
        return "a table of separated values", _BY_PANDAS.format(read=f"read_csv(sys.argv[1], {options})")
    return None
