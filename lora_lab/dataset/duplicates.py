"""Find rows that are equal to an earlier row, or nearly so."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lora_lab.dataset.content import text_of
from lora_lab.dataset.kept_rows import whole
from lora_lab.options import Duplicates

NEAR = 0.8
"""Rows are near duplicates when their runs of words are shared to this part: the Jaccard index."""

MOST_COUNTED = 20_000
"""With more rows than this, near duplicates are looked for only where they are to be dropped: 1,000 rows take about
0.15 s, and memory grows with the rows."""

_RUN = 3
_HASHES = 128
_LOOKED_AT = (0.2, 0.8)
"""How the index weighs looking at too many rows against missing some. What it finds is compared exactly."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]+")
"""A word; in scripts without spaces between words, a character."""

_Row = TypeVar("_Row", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Distinct(Generic[_Row]):
    """Rows after `data.duplicates`."""

    rows: list[_Row]
    repeated: int
    """How many were equal to an earlier one, dropped or not."""
    near_repeated: int | None
    """How many more were nearly equal to an earlier or a held-out one, dropped or not; None where that was not looked
    for."""
    dropped: int


def without_duplicates(rows: Sequence[_Row], duplicates: Duplicates, heldout: Sequence[_Row] = ()) -> Distinct[_Row]:
    """Drop the duplicates that are not to be kept, and count all of them.

    Args:
        heldout: rows of a file of their own. They come before all others here, so that what nearly equals one of them
            is a near duplicate."""
    different = list(dict.fromkeys(rows))
    near = set[int]()
    looked = duplicates is Duplicates.near or len(rows) <= MOST_COUNTED
    if looked:
        texts = [text_of(whole(row)) for row in (*heldout, *different)]
        near = {place - len(heldout) for place in near_duplicates(texts) if place >= len(heldout)}
    kept = list(rows) if duplicates is Duplicates.keep else different
    if duplicates is Duplicates.near:
        kept = [row for index, row in enumerate(different) if index not in near]
    return Distinct(kept, len(rows) - len(different), len(near) if looked else None, len(rows) - len(kept))


def near_duplicates(texts: Sequence[str]) -> set[int]:
    """Return the indices of texts that share NEAR of their runs of three words with an earlier one that is not itself a
    near duplicate.

    Candidates come from a MinHash index (Broder 1997; the package datasketch), which may miss some, and are compared
    exactly. Letter case and punctuation do not count."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=NEAR, num_perm=_HASHES, weights=_LOOKED_AT)
    found = set[int]()
    hashed = MinHash.generator((runs_of_words(text) for text in texts), num_perm=_HASHES)
    for place, minhash in enumerate(hashed):
        mine = runs_of_words(texts[place])
        others = (runs_of_words(texts[other]) for other in index.query(minhash))
        if any(len(mine & other) >= NEAR * len(mine | other) for other in others):
            found.add(place)
        else:
            index.insert(place, minhash)
    return found


def runs_of_words(text: str) -> set[bytes]:
    """Return every run of three words; of a shorter text, all of it."""
    words = _WORD.findall(text.lower())
    return {" ".join(words[start : start + _RUN]).encode() for start in range(max(1, len(words) - _RUN + 1))}
