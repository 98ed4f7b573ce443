"""What a row holds, whatever its class: a digest that orders rows, and its text."""

import dataclasses
import hashlib
from collections.abc import Hashable, Iterator, Sequence
from enum import Enum
from typing import Any, TypeVar

_Row = TypeVar("_Row", bound=Hashable)


def row_digest(row: Hashable) -> bytes:
    """Return a digest of all text of a row, roles included. It is the same in every process, and whatever else the
    row's class holds."""
    return hashlib.sha256("\0".join(_texts(_plain(row))).encode()).digest()


def by_content(rows: Sequence[_Row]) -> list[_Row]:
    """Return the rows in the order of their digests: shuffled, and by nothing except their content."""
    return sorted(rows, key=row_digest)


def text_of(row: Hashable) -> str:
    """Return all text of a row without roles, one piece per line."""
    return "\n".join(text for text in _texts(_plain(row)) if not isinstance(text, Enum))


def _plain(row: Hashable) -> Any:
    return dataclasses.astuple(row) if dataclasses.is_dataclass(row) and not isinstance(row, type) else row


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, (tuple, list)):
        for inner in node:
            yield from _texts(inner)
