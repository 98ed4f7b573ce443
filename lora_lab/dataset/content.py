"""What a row holds, whatever its class: a digest that orders rows, and its text."""

import dataclasses
import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from enum import Enum
from typing import TypeVar

from lora_lab.dataset.row import CONVERSATIONS, PASSAGES, Passage, Row

_Row = TypeVar("_Row", bound=Hashable)


class Mark:
    """What is known of a row without its text. Marks are equal when their rows are."""

    __slots__ = ("_identity", "digest", "is_passage", "prompt")

    def __init__(self, row: Row) -> None:
        self._identity = _short_digest(row)
        self.digest = row_digest(row)
        """The digest that orders rows."""
        self.is_passage = isinstance(row, Passage)
        """Whether it is plain text, not a conversation."""
        self.prompt = _short_digest(row.prompt) if row.prompt else b""
        """Equal when prompts are; empty for a row without one."""

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mark) and self._identity == other._identity


def row_digest(row: Hashable) -> bytes:
    """Return a digest of all text of a row, roles included. It is the same in every process, and whatever else the
    row's class holds."""
    return row.digest if isinstance(row, Mark) else hashlib.sha256("\0".join(_texts(row)).encode()).digest()


def is_passage(row: Hashable) -> bool:
    """Return whether a row is plain text, not a conversation."""
    return row.is_passage if isinstance(row, Mark) else isinstance(row, Passage)


def kinds_of(rows: Iterable[Hashable]) -> str:
    """Return of which kinds the rows are: conversations, passages, or both."""
    return " and ".join(sorted({PASSAGES if is_passage(row) else CONVERSATIONS for row in rows}))


def by_content(rows: Sequence[_Row]) -> list[_Row]:
    """Return the rows in the order of their digests: shuffled, and by nothing except their content."""
    return sorted(rows, key=row_digest)


def text_of(row: Hashable) -> str:
    """Return all text of a row without roles, one piece per line."""
    return "\n".join(text for text in _texts(row) if not isinstance(text, Enum))


def _texts(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, (tuple, list)):
        for inner in node:
            yield from _texts(inner)
    elif dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from _texts(getattr(node, field.name))


def _short_digest(part: object) -> bytes:
    """Return a digest that is the same for equal parts of rows, and for no others."""
    return hashlib.blake2b(repr(part).encode(), digest_size=16).digest()
