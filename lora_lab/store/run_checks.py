"""Checks of what comes out of a store, because anyone may have written it.

They decide which runs can be read as lora_lab's, and which text can be shown."""

import math
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from lora_lab.config import TrialConfig
from lora_lab.settings import settings_of

_LATEST_MS = 2**43
"""A Unix time in the year 2248."""

TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of writing, so that one text looks like another."""


def _numbers() -> Iterator[tuple[str, type, bool]]:
    """Yield every setting that is a number: its dotted key, its type, and whether it can be absent."""
    for each in settings_of(TrialConfig):
        kinds = get_args(each.field.type) or (each.field.type,)
        if kinds[0] in (int, float) and str not in kinds:
            yield each.key, kinds[0], type(None) in kinds


_NUMBERS: dict[str, type] = {**{key: kind for key, kind, _ in _numbers()}, "repeat": int, "trials": int, "points": int}
"""Params that are read as numbers."""

_OPTIONAL = {key for key, _, optional in _numbers() if optional}
"""Those of these params that can be None."""

_SMALLEST, _LARGEST = 1e-200, 1e200
"""Limits of a figure. Between them its ratios and logarithms are numbers too."""


def fault_of(started_ms: object, params: Mapping[str, Any], metrics: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
    """Return why a run cannot be one of lora_lab's as the report reads them; empty when it can."""
    if not isinstance(started_ms, int) or not 0 < started_ms < _LATEST_MS:
        return f"its start is {started_ms}, which is not a time"
    for kind, texts in (("param", params), ("tag", tags)):
        odd = next((key for key, text in texts.items() if not isinstance(text, str)), None)
        if odd is not None:
            return f"its {kind} {odd} is not a text"
    for key, value in metrics.items():
        if not isinstance(value, int | float):
            return f"its metric {key} is not a number"
        if math.isfinite(value) and value != 0 and not _SMALLEST <= abs(value) <= _LARGEST:
            return f"its metric {key} is {value:g}, which cannot be a measurement"
    for key, number in _NUMBERS.items():
        text = params.get(key)
        if text is None or (text == "None" and key in _OPTIONAL):
            continue
        if not _is(number, text):
            return f"its param {key} is {text!r}, which is not a number"
    return ""


def is_reading(reading: tuple[Any, Any, Any]) -> bool:
    """Return whether a point of a series is a time (Unix, ms), a step and a figure that can be drawn."""
    t_ms, step, value = reading
    if not isinstance(t_ms, int) or not isinstance(step, int) or not isinstance(value, int | float):
        return False
    return 0 < t_ms < _LATEST_MS and abs(step) < _LATEST_MS and (not math.isfinite(value) or abs(value) <= _LARGEST)


def _is(number: type, text: str) -> bool:
    try:
        number(text)
    except (ValueError, OverflowError):
        return False
    return number is float or (text.isascii() and len(text) < 20)


def printable(text: str) -> str:
    """Return the text without characters that a terminal acts on.

    These are control characters, and characters that change the direction of writing."""
    spaced = text.replace("\n", " ").replace("\t", " ")
    return "".join(c for c in spaced if unicodedata.category(c) != "Cc" and c not in TURNING)
