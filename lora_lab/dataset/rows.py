"""Read, check and split rows of text, before any tokenizer or model is loaded."""

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from lora_lab.config import DataConfig, InvalidInput
from lora_lab.dataset.file_kinds import check_file_kind
from lora_lab.dataset.json_records import Numbered, read_records
from lora_lab.dataset.layouts import Format, NothingToTrain, format_of, unknown
from lora_lab.dataset.row import Row

SHIPPED = Path(__file__).resolve().parent / "data" / "lab_qa.jsonl"
_SPLIT_SEED = 0


_MOST_SHOWN = 5
"""Faults that a message names, and records of each."""


def read_jsonl(path: Path, data: DataConfig, limit: int | None = None) -> list[Row]:
    """Read rows from a file with one JSON object a line, or with one JSON list of them; blank lines are skipped.

    Raises: InvalidInput naming the lines that are broken or lack a column, or what the file is instead.
    """
    check_file_kind(path)
    rows = rows_of(read_records(path), data, f"data.path={path}", "line", limit)
    if not rows:
        raise InvalidInput(f"data.path={path} is empty; it needs one JSON object a line.")
    return rows


def rows_of(
    records: Numbered,
    data: DataConfig,
    source: str,
    unit: str,
    limit: int | None = None,
    leave_out_empty: bool = False,
) -> list[Row]:
    """Turn the records of one source into rows of one layout, at most `limit`.

    Args:
        leave_out_empty: a record without an answer is no fault; there is no row for it.

    Raises: InvalidInput for records of no known layout, and naming each fault by `unit` (line, row) and number."""
    numbered = iter(islice(records, limit))
    before: list[tuple[int, object]] = []
    layout = None
    try:
        while layout is None and (found := next(numbered, None)) is not None:
            before.append(found)
            layout = format_of(found[1], data)
    except InvalidInput as foreign:
        raise InvalidInput(f"{source}: {foreign}") from foreign
    rows: list[Row] = []
    faults: dict[str, list[int]] = {}
    for number, fields in chain(before, numbered):
        try:
            if isinstance(fields, InvalidInput):
                raise fields
            if layout is None:
                raise InvalidInput(unknown(fields, data))
            rows.append(layout.row_of(fields))
        except InvalidInput as error:
            if not (leave_out_empty and isinstance(error, NothingToTrain)):
                faults.setdefault(_mixed(fields, layout, data) or str(error), []).append(number)
    if faults:
        raise InvalidInput(_refusal(faults, source, unit))
    return rows


def _mixed(fields: object, layout: Format | None, data: DataConfig) -> str:
    """Say that a record has another layout than those before; empty when it has none or the same."""
    if layout is None or not isinstance(fields, dict) or layout.fits(fields):
        return ""
    try:
        other = format_of(fields, data)
    except InvalidInput as foreign:
        return str(foreign)
    if other is None or other == layout:
        return ""
    return (
        f"this is {other.name} ({', '.join(other.needed)}), and others are {layout.name} "
        f"({', '.join(layout.needed)}). One source has one layout: make a file of each."
    )


def _refusal(faults: dict[str, list[int]], source: str, unit: str) -> str:
    """Name the first faults, each once, with the first records that have it."""
    shown = [f"{_numbered(numbers, unit)}: {fault}" for fault, numbers in faults.items()]
    more = [f"and {len(shown) - _MOST_SHOWN} more faults"] if len(shown) > _MOST_SHOWN else []
    count = sum(map(len, faults.values()))
    return "\n  ".join([f"{source} has {count} broken {unit}(s):", *shown[:_MOST_SHOWN], *more])


def _numbered(numbers: list[int], unit: str) -> str:
    if len(numbers) == 1:
        return f"{unit} {numbers[0]}"
    more = f" and {len(numbers) - _MOST_SHOWN} more" if len(numbers) > _MOST_SHOWN else ""
    return f"{unit}s {', '.join(map(str, numbers[:_MOST_SHOWN]))}{more}"


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
    trained = {row.prompt for index, row in enumerate(rows) if index not in held and row.prompt}
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
