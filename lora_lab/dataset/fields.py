"""Take text out of a record's columns."""

import json
from collections.abc import Mapping
from typing import Any

from lora_lab.config import InvalidInput

Fields = Mapping[Any, Any]
"""One record: values by the names of their columns."""


def text_of(fields: Fields, column: str) -> str:
    """Return a column's text as it is.

    Raises: InvalidInput for anything that is not text, also for 0, false and [], and for half a character."""
    text = fields.get(column)
    if not isinstance(text, str):
        raise InvalidInput(f"{column} must be text, and is {written(text)}. Write a text, or leave the row out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{column} holds {ascii(text[error.start])[1:-1]} alone, half of a character. Write the whole one."
        ) from error
    return text


def written(value: object) -> str:
    """Return a value of another kind as the file has it; texts, lists and objects only by that word."""
    kinds: dict[type, str] = {list: "a list", dict: "an object", str: "text"}
    return kinds.get(type(value)) or json.dumps(value, default=lambda other: type(other).__name__)[:40]
