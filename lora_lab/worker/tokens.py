"""Tokenise a text once, and find its places among the tokens."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return a text's ids without the special tokens that a tokenizer adds."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as ids, and how many of them come before each place that was asked for."""

    ids: list[int]
    before: dict[int, int]
    apart: bool
    """A token spans one of the edges, so the text was cut at all places before it was tokenised."""


def tokens_of(tokenizer: Any, whole: str, edges: Iterable[int], ends: Iterable[int] = ()) -> Tokens:
    """Tokenise a text.

    Args:
        edges: places in `whole` that no token may span.
        ends: places that a token may span; it counts as before them.
    """
    edges, ends = [*edges], [*ends]
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        first = [start for start, _ in made["offset_mapping"]]
        before = {place: bisect_left(first, place) for place in (*edges, *ends)}
        if not any(before[edge] and made["offset_mapping"][before[edge] - 1][1] > edge for edge in edges):
            return Tokens(made["input_ids"], before, apart=False)
    else:
        ids = encode(tokenizer, whole)
        parts = {place: encode(tokenizer, whole[:place]) for place in (*edges, *ends)}
        if all(ids[: len(part)] == part for part in parts.values()):
            return Tokens(ids, {place: len(part) for place, part in parts.items()}, apart=False)
    cuts = sorted({0, *edges, *ends, len(whole)})
    ids, before = [], {0: 0}
    for start, end in pairwise(cuts):
        ids += encode(tokenizer, whole[start:end])
        before[end] = len(ids)
    return Tokens(ids, before, apart=True)
