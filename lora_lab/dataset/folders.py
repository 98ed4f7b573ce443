"""Find the files of records in a folder: one that save_to_disk made, or one of data files."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from lora_lab.config import InvalidInput
from lora_lab.dataset.data_files import DataFile
from lora_lab.dataset.file_kinds import TEXT_ENDINGS, TEXT_TO_ROWS
from lora_lab.files import read_json

_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_MOST_ENTRIES = 10_000
_TRAIN = "train"

_SPLIT_WORDS = {
    "train": _TRAIN,
    "training": _TRAIN,
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""The words in a file's name that make it part of a split, as the package datasets has them."""


def files_of_folder(folder: Path, split: str | None, key: str) -> tuple[list[DataFile], str]:
    """Return the files to read, in order, and which split they are, with those that are not read; empty without splits.

    Args:
        split: the one that was asked for; None for train, or the only one.
        key: the setting that named the folder.

    Raises: InvalidInput for a folder without data files, a model's folder, and a split that is not there."""
    name = f"{key}={folder}"
    saved_splits = [str(each) for each in _listed(folder / "dataset_dict.json", "splits")]
    if saved_splits:
        chosen, remark = _choose(saved_splits, split, name)
        return _saved(folder / chosen, key), remark
    if (folder / "state.json").is_file():
        if split is not None:
            raise InvalidInput(f"{name} was saved as one data set without splits. Leave data.split={split} out.")
        return _saved(folder, key), ""
    if any(folder.glob("*.safetensors")):
        raise InvalidInput(f"{name} is a model's folder, which model.path takes. Give the folder or file of the rows.")
    found = sorted(_files(folder, _ENDINGS, name))
    if not found:
        _check_no_text(folder, name)
        raise InvalidInput(
            f"{name} is a folder without data files. Give a folder of files that end in {', '.join(_ENDINGS)}, or one "
            "that save_to_disk made."
        )
    splits: dict[str, list[Path]] = {}
    for path in found:
        splits.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if list(splits) == [""] and split is None:
        return [DataFile(path, key) for path in found], ""
    if "" in splits and (len(splits) > 1 or split is not None):
        named = ", ".join(sorted(splits.keys() - {""})) or "none"
        raise InvalidInput(
            f"{name}: the names of its files do not say which split each belongs to ({splits[''][0].name} does not; "
            f"found splits: {named}). Name the files to train on: {key}=FILE, or data.sources=[{{path: FILE}},...]."
        )
    chosen, remark = _choose(list(splits), split, name)
    return [DataFile(path, key) for path in splits[chosen]], remark


def _choose(splits: Iterable[str], asked: str | None, name: str) -> tuple[str, str]:
    """Return the split to use, and what the user should know of it."""
    found = sorted(splits)
    chosen = asked or (found[0] if len(found) == 1 else _TRAIN)
    if chosen not in found:
        has = f"no split {chosen}" if asked else "several splits and none of them is train"
        raise InvalidInput(f"{name} has {has}; it has {', '.join(found)}. Choose with data.split={found[0]}.")
    others = [split for split in found if split != chosen]
    return chosen, f"{name}: the split {chosen} is read; {', '.join(others)} is not" if others and not asked else ""


def _saved(folder: Path, key: str) -> list[DataFile]:
    """Return the files of a data set that save_to_disk wrote."""
    names = [each.get("filename") for each in _listed(folder / "state.json", "_data_files") if isinstance(each, dict)]
    files = [DataFile(folder / str(name), key) for name in names if name]
    missing = next((file for file in files if not file.path.is_file()), None)
    if not files or missing:
        what = f"the file {missing.path.name} of it is missing" if missing else "its state.json names no file"
        raise InvalidInput(f"{key}={folder} was made by save_to_disk, but {what}. Save or copy it again.")
    return files


def _listed(path: Path, field: str) -> list[object]:
    """Return a list that a JSON file holds; empty where there is none."""
    found = read_json(path)
    value = found.get(field) if isinstance(found, dict) else None
    return value if isinstance(value, list) else []


def _check_no_text(folder: Path, name: str) -> None:
    """Raise InvalidInput, with the command that makes rows, for a folder of plain text."""
    texts = Counter(path.suffix for path in _files(folder, TEXT_ENDINGS, name) if path.suffix in TEXT_ENDINGS)
    if texts:
        [(ending, _)] = texts.most_common(1)
        raise InvalidInput(
            f"{name} is a folder of plain text (*{ending}), not of rows. Make a row of each paragraph, and give "
            "rows.jsonl instead:\n"
            f"  find {shlex.quote(str(folder))} -name '*{ending}' -exec {TEXT_TO_ROWS} {{}} + > rows.jsonl"
        )


def _files(folder: Path, endings: tuple[str, ...], name: str) -> Iterator[Path]:
    entries = list(islice(folder.rglob("*"), _MOST_ENTRIES + 1))
    if len(entries) > _MOST_ENTRIES:
        raise InvalidInput(
            f"{name} holds more than {_MOST_ENTRIES:,} files and folders. Give the folder with the rows."
        )
    for path in entries:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        plain = path.name.removesuffix(".gz")
        if not hidden and plain.endswith(endings) and plain not in _ABOUT_DATA and path.is_file():
            yield path


def _split_of(path: Path) -> str:
    """Return the split that a path below the folder names; empty where it names none."""
    words = re.split(r"[^a-z]+", path.as_posix().lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")
