"""Compare a written answer with the gold one."""

import unicodedata

from lora_lab.quality.maths_scorer import says_its_answer, stated_number


def matches(text: str, gold: str) -> bool:
    """Return whether an answer is the gold one.

    Where the gold text says "the answer is" or "answer:" with a number, it is the number that has to be equal
    (maths_scorer.py). Elsewhere it is the text, but for case, spaces, and the punctuation around it."""
    if says_its_answer(gold):
        return stated_number(text) == stated_number(gold)
    return normalised(text) == normalised(gold)


def normalised(text: str) -> str:
    """Return a text in one case and one Unicode form, with single spaces, and without punctuation at its ends."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    start, end = 0, len(words)
    while start < end and _is_outer(words[start]):
        start += 1
    while end > start and _is_outer(words[end - 1]):
        end -= 1
    return words[start:end]


def _is_outer(character: str) -> bool:
    return character == " " or unicodedata.category(character).startswith("P")
