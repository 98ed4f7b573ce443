"""Read the rows of a data set on the Hugging Face hub."""

import re
from typing import Any

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig
from lora_lab.dataset.layouts import format_of, unknown
from lora_lab.dataset.row import Row
from lora_lab.dataset.rows import rows_of


def hub_rows(data: DataConfig) -> tuple[list[Row], int]:
    """Read the rows of a split, and count those with an empty answer, which are left out (alpaca has some).

    Raises: InvalidInput when the data set could not be loaded, lacks a column, or a row is broken."""
    records = _records(data)
    rows = rows_of(records, data, f"data.id={data.id}", "row", leave_out_empty=True)
    return rows, len(records) - len(rows)


def _records(data: DataConfig) -> list[tuple[int, dict[str, Any]]]:
    import datasets
    from datasets.exceptions import DatasetsError

    split = data.split or "train"
    try:
        part = f"{split}[:{data.rows}]" if data.rows else split
        loaded = datasets.load_dataset(data.id, data.config, revision=data.revision, split=part)
        names = dict.fromkeys(loaded.column_names)
        layout = format_of(names, data)
        if layout is None:
            raise InvalidInput(unknown(names, data))
        # other columns, pictures perhaps, need not be decoded
        texts = loaded.select_columns([name for name in names if name in layout.columns.values()])
        return [(number, dict(fields)) for number, fields in enumerate(texts, start=1)]
    except InvalidInput as refusal:
        raise InvalidInput(f"data.id={data.id}: {refusal}") from refusal
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, DatasetsError) as error:
        raise InvalidInput(_refusal(data, split, error)) from error


def _refusal(data: DataConfig, split: str, error: Exception) -> str:
    """Say what to do about an error of the package datasets, most of which differ by their text alone."""
    name = str(data.id)
    text = str(error.__cause__ or error)
    listed = re.search(r"\[(.*?)\]", text)
    found = f" (it has {listed[1]})" if listed else ""
    if "gated" in text:
        return (
            f"data.id={name} is gated. Accept its licence on https://huggingface.co/datasets/{name} and log in with "
            "hf auth login, or use data=lab_qa."
        )
    if "Config name is missing" in text:
        return f"data.id={name} has several configurations{found}. Choose with data.config=NAME."
    if re.search(r"BuilderConfig .* not found", text):
        return f"data.id={name} has no configuration {data.config}{found}. Choose with data.config=NAME."
    if re.search(r"(Unknown|Bad) split", text):
        return f"data.id={name} has no split {split}{found}. Choose with data.split=NAME."
    if "scripts are no longer supported" in text:
        return f"data.id={name} is a script, which the package datasets no longer runs. Use another copy of the data."
    if "Revision" in text:
        return f"data.id={name} has no revision of that name. Check data.revision, or leave it out."
    said = text.strip().splitlines()[0] if text.strip() else "no message"
    return (
        f"data.id={name} could not be loaded from the Hugging Face hub "
        f"({type(error.__cause__ or error).__name__}: {said}). "
        "Check the name and the connection, or use data=lab_qa or data=jsonl data.path=FILE."
    )
