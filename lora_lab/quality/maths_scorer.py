"""Find the number that a written answer to a maths problem gives. Two answers are equal when these numbers are."""

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"""
    (?<![\w.^/])                                              # not the 2 of m2, m^2 or 1.2
    (?P<minus>(?<![)\]])(?<![0-9)\]][ ])[-\u2212])?           # a sign, and not the minus of 9 - 4 or (5)-1
    [$\u20ac\u00a3]?
    (?P<whole>[0-9]{1,3}(?:[,'\u2019\u00a0\u202f][0-9]{3}){1,12}|[0-9]{1,40})
    (?:\.(?P<decimals>[0-9]{1,40})|/(?P<below>[0-9]{1,40}))?
    (?![0-9])
    """,
    re.VERBOSE,
)
_PHRASE = re.compile(r"\banswer(?:\s+is|\s*:)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")


def says_its_answer(text: str) -> bool:
    """Return whether a text says "the answer is" or "answer:" with a number in the rest of that sentence."""
    return _said_number(text) is not None


def stated_number(text: str) -> Fraction | None:
    """Return the number that a text gives as its answer: the last one after its last "answer is", or of all of it."""
    said = _said_number(text)
    return last_number(text) if said is None else said


def _said_number(text: str) -> Fraction | None:
    phrases = [*_PHRASE.finditer(text)]
    if not phrases:
        return None
    return last_number(_SENTENCE_END.split(text[phrases[-1].end() :].lstrip(), maxsplit=1)[0])


def last_number(text: str) -> Fraction | None:
    """Return the last number in a text, exactly; None when there is none.

    Units and currencies around it, thousands separators (comma, apostrophe, no-break space) and zeros at the end of
    its decimals do not matter. A fraction such as 3/4 is one number.
    """
    numbers = [*_NUMBER.finditer(text)]
    if not numbers:
        return None
    found = numbers[-1]
    whole, decimals, below = re.sub("[^0-9]", "", found["whole"]), found["decimals"] or "", found["below"]
    if below is not None and not int(below):
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals)) / int(below or 1)
    return -value if found["minus"] else value
