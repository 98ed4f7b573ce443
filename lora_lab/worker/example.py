"""One row as tokens, of which some are trained."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. `labels` are the ids that are predicted and IGNORED elsewhere; both have
    the same length. `starts` are the positions where a document begins (several when packed)."""

    ids: list[int]
    labels: list[int]
    truncated: bool = False
    starts: tuple[int, ...] = (0,)

    @property
    def trained(self) -> int:
        """Count the labels that are predicted: the first position never is."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def document_lengths(self) -> list[int]:
        """Return the tokens of each document in the row."""
        return [end - start for start, end in pairwise([*self.starts, len(self.ids)])]


def sha256_of(rows: Iterable[Example]) -> str:
    """Return the sha256 over the ids and labels of all rows, in order."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(repr((row.ids, row.labels)).encode())
    return sha.hexdigest()
