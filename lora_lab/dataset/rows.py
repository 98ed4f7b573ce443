"""Turn records into rows of text, before any tokenizer or model is loaded."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_lab.config import ColumnsConfig, InvalidInput
from lora_lab.dataset.json_records import Numbered

SHIPPED = Path(__file__).resolve().parent / "data" / "lab_qa.jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer."""

    prompt: str
    response: str


def rows_of(records: Numbered, columns: ColumnsConfig, source: str, unit: str, limit: int | None = None) -> list[Row]:
    """Turn records into rows, at most `limit`.

    Raises: InvalidInput naming the first few that are broken, by `unit` (line, row) and number."""
    rows: list[Row] = []
    broken: list[str] = []
    for number, fields in islice(records, limit):
        try:
            if isinstance(fields, InvalidInput):
                raise fields
            rows.append(row_of(fields, columns))
        except InvalidInput as error:
            broken.append(f"{unit} {number}: {error}")
    if broken:
        shown = "\n  ".join(broken[:5])
        more = f"\n  and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise InvalidInput(f"{source} has {len(broken)} broken {unit}(s):\n  {shown}{more}")
    return rows


def row_of(fields: object, columns: ColumnsConfig) -> Row:
    """Turn one record into a row: the instruction, then the optional input after a blank line.

    Raises: InvalidInput when it is not an object, lacks a column, or a column holds something other than text.
    """
    if not isinstance(fields, dict):
        raise InvalidInput(f"expected a JSON object, found {type(fields).__name__}")
    missing = [name for name in (columns.instruction, columns.output) if name not in fields]
    if missing:
        found = (str(name) if str(name).isprintable() else ascii(name) for name in fields)
        raise InvalidInput(
            f"no column {' and no column '.join(missing)}; found {', '.join(found) or 'none'}. "
            "Name yours with data.columns.instruction=... data.columns.output=..."
        )
    # data.columns.instruction=input leaves the default name of the context behind; nothing is to stand there twice
    has_context = columns.input not in (columns.instruction, columns.output) and fields.get(columns.input) is not None
    context = _text(fields, columns.input) if has_context else ""
    instruction, output = _text(fields, columns.instruction), _text(fields, columns.output)
    if not instruction or not output:
        raise InvalidInput("instruction and output must not be empty")
    return Row(prompt=f"{instruction}\n\n{context}" if context else instruction, response=output)


def _text(fields: dict[Any, Any], column: str) -> str:
    """Return a column's text without the space around it.

    Raises: InvalidInput for anything that is not text, also for 0, false and [], and for half a character."""
    text = fields[column]
    if not isinstance(text, str):
        raise InvalidInput(f"{column} must be text, and is {_written(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{column} holds {ascii(text[error.start])[1:-1]} alone, half of a character. Write the whole one."
        ) from error
    return text.strip()


def _written(value: object) -> str:
    """Return a value of another kind as the file has it; lists and objects only by that word."""
    kinds: dict[type, str] = {list: "a list", dict: "an object"}
    return kinds.get(type(value)) or json.dumps(value, default=lambda other: type(other).__name__)[:40]
