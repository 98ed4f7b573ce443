"""Read, check and split rows of text, before any tokenizer or model is loaded."""

import json
import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_lab.config import ColumnsConfig, InvalidInput
from lora_lab.dataset.file_kinds import check_file_kind
from lora_lab.dataset.json_records import Numbered, read_records

SHIPPED = Path(__file__).resolve().parent / "data" / "lab_qa.jsonl"
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer."""

    prompt: str
    response: str


def read_jsonl(path: Path, columns: ColumnsConfig, limit: int | None = None) -> list[Row]:
    """Read rows from a file with one JSON object a line, or with one JSON list of them; blank lines are skipped.

    Raises: InvalidInput naming the lines that are broken or lack a column, or what the file is instead.
    """
    check_file_kind(path, columns)
    rows = rows_of(read_records(path), columns, f"data.path={path}", "line", limit)
    if not rows:
        raise InvalidInput(f"data.path={path} is empty; it needs one JSON object a line.")
    return rows


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


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows are held out, and how well that separates trained from held-out rows."""

    held: set[int]
    repeated: int
    """Rows that are equal to an earlier one."""
    prompts_trained: int
    """Held-out rows whose prompt is trained on too, with another answer."""


def split_rows(rows: Sequence[Row], share: float) -> Split:
    """Hold out a share of the rows.

    Raises: InvalidInput when too many are equal."""
    held = heldout_indices(rows, share)
    trained = {row.prompt for index, row in enumerate(rows) if index not in held}
    asked_again = sum(rows[index].prompt in trained for index in held)
    return Split(held, repeated=len(rows) - len(set(rows)), prompts_trained=asked_again)


def heldout_indices(rows: Sequence[Hashable], share: float) -> set[int]:
    """Choose the rows to hold out: at least one, and of equal rows all or none, so that none is also trained on. They
    are the same for every seed and batch size, so that held-out losses of different trials can be compared.

    Raises: InvalidInput when every row is repeated more often than rows are to be held out."""
    room = max(1, round(len(rows) * share))
    copies = Counter(rows)
    fitting = [row for row, count in copies.items() if count <= room]
    if len(copies) == 1 < len(rows):
        raise InvalidInput(
            f"all {len(rows)} rows are equal, so none can be held out that is not trained on. Give rows that differ."
        )
    if not fitting:
        fewest = min(copies.values())
        raise InvalidInput(
            f"data.holdout={share:g} of {len(rows)} rows is {room}, but each of the {len(copies)} different ones comes "
            f"{fewest} times or more, and equal rows are held out together. "
            f"Use data.holdout={math.ceil(100 * fewest / len(rows)) / 100} or more, or rows that differ."
        )
    held: set[Hashable] = set()
    for place in random.Random(_SPLIT_SEED).sample(range(len(fitting)), max(1, round(len(fitting) * share))):
        row = fitting[place]
        if copies[row] <= room:
            room -= copies[row]
            held.add(row)
    return {index for index, row in enumerate(rows) if row in held}


def check_row_count(count: int, holdout: float, needed: int, which: str = "rows") -> None:
    """Raise InvalidInput unless, after holding out, `needed` rows (one optimizer step's) remain to train on."""
    remaining = count - max(1, round(count * holdout))
    if remaining < needed:
        raise InvalidInput(
            f"the data has {count} {which}, {remaining} after holding out {holdout:.0%}, but one step needs {needed} "
            "(batch_size x grad_accum_steps). Use more rows or a smaller batch_size."
        )
