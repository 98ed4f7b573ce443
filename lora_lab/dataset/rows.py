"""Turn records into rows of text, before any tokenizer or model is loaded."""

from collections.abc import Iterator
from itertools import chain, islice

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig
from lora_lab.dataset.json_records import Numbered
from lora_lab.dataset.layouts import Format, NothingToTrain, format_of, unknown
from lora_lab.dataset.row import Row

_MOST_SHOWN = 5
"""Faults that a message names, and records of each."""


class BrokenRecords(InvalidInput):
    """Records of a source make no rows."""


def rows_of(
    records: Numbered,
    data: DataConfig,
    source: str,
    unit: str,
    limit: int | None = None,
    leave_out_empty: bool = False,
) -> Iterator[Row]:
    """Turn the records of one source into rows of one layout, at most `limit`.

    Args:
        leave_out_empty: a record without an answer is no fault; there is no row for it.

    Raises: BrokenRecords for records of no known layout; and, after the last row, naming each fault by `unit` (line,
    row) and number."""
    numbered = iter(islice(records, limit))
    before: list[tuple[int, object]] = []
    layout = None
    while layout is None and (found := next(numbered, None)) is not None:
        before.append(found)
        try:
            layout = format_of(found[1], data)
        except InvalidInput as foreign:
            raise BrokenRecords(f"{source}: {foreign}") from foreign
    faults: dict[str, list[int]] = {}
    for number, fields in chain(before, numbered):
        try:
            if isinstance(fields, InvalidInput):
                raise fields
            if layout is None:
                raise InvalidInput(unknown(fields, data))
            row = layout.row_of(fields)
        except InvalidInput as error:
            if not (leave_out_empty and isinstance(error, NothingToTrain)):
                faults.setdefault(_mixed(fields, layout, data) or str(error), []).append(number)
        else:
            yield row
    if faults:
        raise BrokenRecords(_refusal(faults, source, unit))


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
        f"{other.name} ({', '.join(other.needed)}), while the rows before are {layout.name} "
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
