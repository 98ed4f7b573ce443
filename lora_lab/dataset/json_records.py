"""Read a JSON file's records with their line numbers: one object per line, or one list of objects."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TypeVar

from lora_lab.config import InvalidInput
from lora_lab.dataset.data_files import DataFile
from lora_lab.dataset.layouts import FORMATS

_Read = TypeVar("_Read")

Numbered = Iterable[tuple[int, object]]
"""Records with their numbers, from 1; an InvalidInput stands for one that cannot be read."""


def read_json(file: DataFile) -> Numbered:
    """Read every record of a file, each with the line that it begins in; blank lines are skipped.

    Raises: InvalidInput for a file of another encoding, a list that breaks off, and objects over several lines."""
    with file.opened() as lines:
        texts = (line.decode("utf-8-sig", errors="replace").strip() for line in lines)
        first, *more = [*islice(filter(None, texts), 2)] or [""]
    if more and not isinstance(_value(first), InvalidInput):
        return _lines(file)
    try:
        with file.opened() as opened:
            text = opened.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        return _lines(file)  # which says where
    if first.startswith("["):
        return _elements(file, text)
    _check_one_object_per_line(file, text)
    return _lines(file)


def _lines(file: DataFile) -> Iterator[tuple[int, object]]:
    with file.opened() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                _check_encoding(file, number)
                yield number, InvalidInput(f"not UTF-8 (the byte {line[error.start]:#04x} at {error.start + 1})")
                continue
            if text.strip():
                yield number, _value(text)


def _elements(file: DataFile, text: str) -> Iterator[tuple[int, object]]:
    """Return the elements of one list, with the lines they begin in."""

    def broken(why: object) -> InvalidInput:
        return InvalidInput(f"{file.name} is one JSON list, which breaks at line {line}: {why}")

    before, at, line = 0, _after_space(text, text.index("[") + 1), 1
    while text[at : at + 1] != "]":
        line += text.count("\n", before, at)
        before = at
        found = _readable(partial(_DECODER.raw_decode, text, at))
        if isinstance(found, InvalidInput):
            raise broken(found)
        value, at = found
        yield line, value
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise broken("a comma or the closing ] is missing")
    if text[at + 1 :].strip():
        raise broken("something stands behind its closing ]")


def _check_one_object_per_line(file: DataFile, text: str) -> None:
    """Raise InvalidInput, with jq's command, when objects are printed over several lines, or the rows lie within one
    object. Accept any other file."""
    values: list[object] = []
    at = _after_space(text, 0)
    while at < len(text):
        found = _readable(partial(_DECODER.raw_decode, text, at))
        if isinstance(found, InvalidInput) or not isinstance(found[0], dict):
            return
        values.append(found[0])
        at = _after_space(text, found[1])
    if not values:
        return
    program = "."
    if len(values) == 1 and isinstance(values[0], dict):
        is_row = any(each.fits(values[0]) for each in FORMATS)  # a chat is a list of objects within one
        lists = (key for key, value in values[0].items() if isinstance(value, list) and _objects(value))
        key = None if is_row else next(lists, None)
        if key is not None:
            program = f".{key}[]" if re.fullmatch(r"[A-Za-z_]\w*", key) else f".[{json.dumps(key)}][]"
        elif text.strip().count("\n") == 0:
            return
    what = "one JSON object" if len(values) == 1 else f"{len(values)} JSON objects over several lines"
    raise InvalidInput(
        f"{file.name} is {what}, not one object per line. Convert it, for example:\n"
        f"  {file.piped_to(f'jq -c {shlex.quote(program)}')} > rows.jsonl"
    )


def _objects(values: list[object]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _only_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise InvalidInput(f"the key {twice!a} comes twice; leave one of them")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_only_once)


def _value(text: str) -> object:
    """Return one JSON value, or why there is none."""
    return _readable(partial(_DECODER.decode, text))


def _readable(read: Callable[[], _Read]) -> _Read | InvalidInput:
    try:
        return read()
    except InvalidInput as refusal:
        return refusal
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        return InvalidInput(f"not JSON ({error.msg} at {place})")
    except RecursionError:
        return InvalidInput("lists or objects are nested too deeply")
    except ValueError:  # Python reads no integer of more than 4,300 digits
        return InvalidInput("a number has too many digits")


def _check_encoding(file: DataFile, number: int) -> None:
    """Raise InvalidInput when no line has a character beyond ASCII in UTF-8: then it is another encoding throughout."""
    with file.opened() as lines:
        if any(not line.isascii() and _is_utf8(line) for line in lines):
            return
    raise InvalidInput(
        f"{file.name} is not UTF-8 text (line {number}). Convert it; Western European text, for example, with:\n"
        f"  {file.piped_to('iconv -f WINDOWS-1252 -t UTF-8')} > utf8.jsonl"
    )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
