"""Check what is read back from files, at this one place, against the types it was written from.

A kill leaves no file half written, but disks fail, people edit, and other versions know other fields. A reader gets a
dataclass whose every field has its type, or `Damaged`, which names the file.
"""

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

_PLAIN: dict[Any, tuple[type, ...]] = {str: (str,), bool: (bool,), int: (int,), float: (float, int)}
_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", tuple: "a list"}
_NOT_FINITE = ("loss", "nats", "value", "metrics")
"""Fields that may be NaN or infinite: a loss where training diverged, and figures made from it."""
_CLOCKS = ("t", "start", "end", "unix_minus_monotonic")
_MOST_SECONDS = 1e11
"""Some 3,000 years."""
_MOST_INTEGER = 2**63
"""The most that databases accept."""


class Damaged(ValueError):
    """A file, or a part of it, is not what was written."""

    def __init__(self, file: Path | None, field: str, what: str) -> None:
        self.file, self.field, self.what = file, field, what
        where = [*([str(file)] if file else []), *([field] if field else [])]
        super().__init__(f"{': '.join(where)} {what}".lstrip())


def whole(kind: type[T], path: Path, without: str = "") -> T | None:
    """Read what was written as `kind`; None where there is no file.

    Args:
        without: a field that is not read and gets its default, because checking a long list takes time.

    Raises: Damaged."""
    content = _bytes_of(path)
    if content is None:
        return None
    with _of(path):
        found = parsed(content)
        if without and isinstance(found, dict):
            found.pop(without, None)
        return typed(kind, found)


def lines(path: Path, read: Callable[[bytes], T], content: bytes | None = None) -> tuple[list[T], Damaged | None]:
    """Read every complete line up to the first damaged one, and say what is wrong with that. A torn last line does not
    count: a kill or a full disk leaves one.

    Args:
        content: what is in the file, where that is known.
    """
    found: list[T] = []
    try:
        there = (_bytes_of(path) or b"") if content is None else content
    except Damaged as damaged:
        return found, damaged
    for number, line in enumerate(io.BytesIO(there), 1):
        if not line.endswith(b"\n") and _torn(line):
            break
        try:
            found.append(read(line.rstrip(b"\n")))
        except Damaged as damaged:
            return found, Damaged(path, f"line {number}{damaged.field and ', '}{damaged.field}", damaged.what)
    return found, None


def _torn(line: bytes) -> bool:
    """Return whether this can be the beginning of an object."""
    try:
        json.loads(line.decode("utf-8"))
    except json.JSONDecodeError:
        return line.startswith(b"{")
    except (ValueError, RecursionError):
        return False
    return False


def parsed(text: str | bytes) -> Any:
    """Parse JSON into plain data.

    Raises: Damaged."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Damaged(None, "", f"is no UTF-8 from byte {error.start} on") from None
    except RecursionError:
        raise Damaged(None, "", "is nested too deeply") from None
    except ValueError as error:
        raise Damaged(None, "", f"is no JSON ({error})") from None


def typed(kind: type[T], found: Any) -> T:
    """Turn plain data into a dataclass, or another type that one uses. Only lists (into tuples) and names of enums are
    converted.

    Raises: Damaged."""
    return cast(T, _typed(kind, found, "", ""))


def text_of(path: Path) -> str | None:
    """Read a text. Bytes that are not UTF-8 come as Python has them in file names; None where there is no file.

    Raises: Damaged."""
    content = _bytes_of(path)
    return None if content is None else content.decode("utf-8", "surrogateescape")


def _bytes_of(path: Path) -> bytes | None:
    """Read a file's bytes; None where there is no file.

    Raises: Damaged where something else is in its place, or it cannot be read."""
    try:
        if not path.is_file():  # a pipe would be waited for
            if path.is_symlink() or path.exists():
                raise Damaged(path, "", "is a folder" if path.is_dir() else "is no file")
            return None
        return path.read_bytes()
    except OSError as error:
        raise Damaged(path, "", f"cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def _of(path: Path) -> Iterator[None]:
    try:
        yield
    except Damaged as damaged:
        raise Damaged(path, damaged.field, damaged.what) from None


def _typed(hint: Any, found: Any, field: str, name: str) -> Any:
    """Convert one value.

    Args:
        field: where it is in the file.
        name: the dataclass's field, which decides what numbers are allowed.
    """
    if type(found) in _PLAIN.get(hint, ()):
        _check_number(found, field, name)
        return found
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(found, dict):
        return _object(hint, found, field)
    if origin in (Union, UnionType):
        return _one_of(hint, found, field, name)
    if origin in (list, tuple) and isinstance(found, list):
        kinds = [inner[0]] * len(found) if origin is list or inner[-1] is ... else inner
        if len(kinds) == len(found):
            each = enumerate(zip(kinds, found, strict=True))
            return origin(_typed(kind, item, f"{field}[{n}]", name) for n, (kind, item) in each)
    elif origin is dict and isinstance(found, dict):
        return {key: _typed(inner[1], item, f"{field}.{key}".lstrip("."), name) for key, item in found.items()}
    elif isinstance(hint, type) and issubclass(hint, Enum) and isinstance(found, str) and found in hint.__members__:
        return hint[found]
    raise Damaged(None, field, f"is {_short(found)}, where {_words(hint)} is needed")


def _object(kind: Any, found: dict[str, Any], field: str) -> Any:
    hints, needed = _fields(kind)
    dot = field and f"{field}."
    for name in needed:
        if name not in found:
            raise Damaged(None, f"{dot}{name}", "is missing")
    for name in found:
        if name not in hints:
            raise Damaged(None, f"{dot}{name[:40]!r}", "is nothing that this version knows")
    return kind(**{name: _typed(hints[name], value, f"{dot}{name}", name) for name, value in found.items()})


def _one_of(hint: Any, found: Any, field: str, name: str) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if found is None and len(kinds) < len(get_args(hint)):
        return None
    if len(kinds) == 1:
        return _typed(kinds[0], found, field, name)
    for kind in kinds:
        with contextlib.suppress(Damaged):
            return _typed(kind, found, field, name)
    raise Damaged(None, field, f"is {_short(found)}, where {_words(hint)} is needed")


def _check_number(found: Any, field: str, name: str) -> None:
    if not isinstance(found, (int, float)) or isinstance(found, bool):
        return
    if isinstance(found, int) and not -_MOST_INTEGER <= found < _MOST_INTEGER:
        raise Damaged(None, field, "is a number beyond sense")
    if name in _NOT_FINITE:
        return
    most = math.inf
    if name.endswith("_ms"):
        most = _MOST_SECONDS * 1e3
    elif name in _CLOCKS or name.endswith("seconds"):
        most = _MOST_SECONDS
    if not math.isfinite(found) or abs(found) > most or (name.endswith("_ms") and found < 0):
        raise Damaged(None, field, f"is {found}, which cannot be")


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Return a dataclass's fields with their types, and those without a default."""
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    return get_type_hints(kind), needed


def _words(hint: Any) -> str:
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("null" if kind is NoneType else _words(kind) for kind in inner)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(hint.__members__)}"
    return _WORDS.get(get_origin(hint) or hint, "an object")


def _short(found: Any) -> str:
    if found is None:
        return "null"
    if isinstance(found, (dict, list)):
        return "an object" if isinstance(found, dict) else "a list"
    text = repr(found) if not isinstance(found, bool) else str(found).lower()
    return text if len(text) <= 40 else f"{text[:40]}..."
