"""Read the records of a data set on the Hugging Face hub."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig
from lora_lab.dataset.layouts import format_of, unknown


@dataclass(frozen=True, slots=True)
class HubSplit:
    """One split of a data set on the hub, as the user named it."""

    id: str
    config: str | None
    revision: str | None
    split: str | None
    key: str
    """The setting that named it."""

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return f"{self.key}={self.id}"

    def typed(self, name: str) -> str:
        """Return what to type to choose a config, revision or split."""
        return f"data.{name}=NAME" if self.key == "data.id" else f"{name}: NAME in data.sources"


def hub_records(asked: HubSplit, data: DataConfig, limit: int | None) -> Collection[Mapping[str, Any]]:
    """Return the records of a split, at most `limit`. They stay in the files of the package datasets.

    Raises: InvalidInput when the data set could not be loaded, or lacks a column."""
    loaded = _load(asked, limit)
    names = dict.fromkeys(loaded.column_names)
    try:
        layout = format_of(names, data)
        if layout is None:
            raise InvalidInput(unknown(names, data))
    except InvalidInput as refusal:
        raise InvalidInput(f"{asked.name}: {refusal}") from refusal
    # other columns, pictures perhaps, need not be decoded
    texts = loaded.select_columns([name for name in names if name in layout.columns.values()])
    return cast(Collection[Mapping[str, Any]], texts)


def hub_files(asked: HubSplit) -> list[Path]:
    """Return the files that the package datasets reads a split from; none for one that is in memory.

    Raises: InvalidInput when the data set could not be loaded."""
    return [Path(each["filename"]) for each in _load(asked, None).cache_files]


def _load(asked: HubSplit, limit: int | None) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    split = asked.split or "train"
    try:
        part = f"{split}[:{limit}]" if limit else split
        return datasets.load_dataset(asked.id, asked.config, revision=asked.revision, split=part)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, DatasetsError) as error:
        raise InvalidInput(_refusal(asked, split, error)) from error


def _refusal(asked: HubSplit, split: str, error: Exception) -> str:
    """Say what to do about an error of the package datasets, most of which differ by their text alone."""
    text = str(error.__cause__ or error)
    listed = re.search(r"\[(.*?)\]", text)
    found = f" (it has {listed[1]})" if listed else ""
    if "gated" in text:
        return (
            f"{asked.name} is gated. Accept its licence on https://huggingface.co/datasets/{asked.id} and log in with "
            "hf auth login, or use data=lab_qa."
        )
    if "Config name is missing" in text:
        return f"{asked.name} has several configurations{found}. Choose with {asked.typed('config')}."
    if re.search(r"BuilderConfig .* not found", text):
        return f"{asked.name} has no configuration {asked.config}{found}. Choose with {asked.typed('config')}."
    if re.search(r"(Unknown|Bad) split", text):
        return f"{asked.name} has no split {split}{found}. Choose with {asked.typed('split')}."
    if "scripts are no longer supported" in text:
        return f"{asked.name} is a script, which the package datasets no longer runs. Use another copy of the data."
    if "Revision" in text:
        choice = asked.typed("revision")
        return f"{asked.name} has no revision {asked.revision}. Choose another with {choice}, or leave it out."
    said = text.strip().splitlines()[0] if text.strip() else "no message"
    return (
        f"{asked.name} could not be loaded from the Hugging Face hub "
        f"({type(error.__cause__ or error).__name__}: {said}). "
        "Check the name and the connection, or use data=lab_qa or data=jsonl data.path=FILE."
    )
