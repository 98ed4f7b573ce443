"""One row as token ids of which some are trained, and what can be wrong with it."""

import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

from lora_lab.dataset.row import Passage, Row

_INVISIBLE = dict.fromkeys([*range(0x21), 0x7F])
"""Spaces and control characters of ASCII, for str.translate."""


class Lost(Enum):
    """What can be wrong with a row's tokens, in words that follow 'in N of M rows'."""

    answer = "an answer is not whole in the trained tokens"
    question = "what is only read is not whole in the tokens that are not trained"
    end = "the end of the turn is not trained exactly once, as an answer's last token"
    end_within = "an answer contains the token that ends a turn, which is written behind each answer already"


@dataclass(frozen=True, slots=True)
class EndWithin:
    """A token that ends a turn, in the text of a row."""

    token: str
    turn: int
    """Counts from 1."""
    around: str
    """The token with some of the text on both sides."""

    def sentences(self, row: int) -> str:
        """Say where it is, and what to type."""
        pattern = re.sub(r"([][\\.*^$#])", r"\\\1", self.token)
        command = f"sed {shlex.quote(f's#{pattern}##g')} ROWS.jsonl > CLEAN.jsonl"
        return f"turn {self.turn} of row {row} has {self.token} in {self.around!r}. Take it out of your rows: {command}"


@dataclass(frozen=True, slots=True)
class LaidOut:
    """One row as token ids."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    """Where the trained ids begin and end, in order; all others are read only."""
    lost: frozenset[Lost] = frozenset()
    apart: bool = False
    """A token spans the beginning of what is trained, so the parts were tokenised separately."""
    unopened: bool = False
    """The generation prompt ends in text that this row is trained without."""
    merged: bool = False
    """The system prompt stands at the start of the first question."""
    end_within: EndWithin | None = None
    """The first end of a turn in an answer's own text."""

    @property
    def read(self) -> list[int]:
        """Return the ids that are not trained."""
        edges = [0, *(place for span in self.spans for place in span), len(self.ids)]
        return [token for start, end in [*pairwise(edges)][::2] for token in self.ids[start:end]]

    @property
    def trained(self) -> list[int]:
        """Return the ids that are trained."""
        return [token for start, end in self.spans for token in self.ids[start:end]]


@dataclass(slots=True)
class Losses:
    """How many rows are not laid out as they should be, with the first row of each kind."""

    rows: int = 0
    lost: int = 0
    """Rows with at least one fault."""
    apart: int = 0
    unopened: int = 0
    merged: int = 0
    kinds: Counter[Lost] = field(default_factory=Counter)
    examples: dict[Lost, str] = field(default_factory=dict)

    def count(self, row: Row, laid: LaidOut, tokenizer: Any) -> None:
        """Count one row."""
        self.rows += 1
        self.lost += bool(laid.lost)
        self.apart += laid.apart
        self.unopened += laid.unopened
        self.merged += laid.merged
        for kind in laid.lost:
            self.kinds[kind] += 1
            if kind in self.examples:
                continue
            if laid.end_within is not None and kind is Lost.end_within:
                self.examples[kind] = laid.end_within.sentences(self.rows)
            else:
                read, trained = tokenizer.decode(laid.read), tokenizer.decode(laid.trained)
                self.examples[kind] = (
                    f"row {self.rows} has {_described(row)}; the model reads {short(read)} and is trained on "
                    f"{short(trained)}"
                )

    def sentences(self) -> list[str]:
        """Return what the user should know of each kind of fault."""
        return [
            f"in {self.kinds[kind]} of {self.rows} rows {kind.value}. For example, {self.examples[kind]}"
            for kind in Lost
            if self.kinds[kind]
        ]


def _described(row: Row) -> str:
    if isinstance(row, Passage):
        return f"the prompt {short(row.prompt)} and the text {short(row.text)}"
    question, answer = row.turns[-2].text, row.turns[-1].text
    turns = f"{len(row.turns)} turns, the last being " if len(row.turns) > 2 else ""
    return f"{turns}the question {short(question)} and the answer {short(answer)}"


def holds(text: str, parts: Iterable[str]) -> bool:
    """Return whether a text has all parts, in this order."""
    place = 0
    for part in parts:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


def spaceless(text: str) -> str:
    """Remove the spaces that templates trim and add."""
    return "".join(text.split())


def bare(text: str) -> str:
    """Remove what tokenizers change on purpose: spaces, case, and the several ways to write one character."""
    if text.isascii():  # as below, in a tenth of the time
        return text.translate(_INVISIBLE).lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(
        c for c in folded if not c.isspace() and c != "\u2581" and unicodedata.category(c) not in ("Cc", "Cf")
    )


def short(text: str) -> str:
    """Quote a text for a message."""
    return repr(text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}")
