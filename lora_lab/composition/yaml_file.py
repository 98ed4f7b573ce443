"""Read a yaml file into dataclasses by the machinery that also checks conf/: wrong keys and types are named by path."""

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.config import InvalidInput

T = TypeVar("T")


def read_yaml(path: Path, what: str) -> Any:
    """Return the plain data of a yaml file.

    Args:
        what: what the file should be, for the message when it is missing.

    Raises: InvalidInput."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidInput(f"there is no file {path}. Name {what}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"{path} cannot be read as yaml: {error}") from error


def as_schema(schema: type[T], data: Any, path: Path, at: str = "") -> T:
    """Turn plain data into a dataclass; every field has its type, and none is missing or unknown.

    Args:
        path: the file it is from.
        at: dotted key of the data in it.

    Raises: InvalidInput that names file and key."""
    if not isinstance(data, dict):
        raise InvalidInput(f"{path}: {at or 'the file'} has to be a mapping (key: value); it is {data!r}.")
    key, made = "", OmegaConf.structured(schema)
    try:
        for key, value in _named(data).items():  # one by one: some errors of OmegaConf name no key
            made = OmegaConf.merge(made, {key: value})
        found: T = OmegaConf.to_object(made)  # type: ignore[assignment]  # an object of the schema
    except OmegaConfBaseException as error:
        where = ".".join(part for part in (at, str(error.full_key or key)) if part)
        why = re.sub(r" in object of type.*|\s*\n.*", "", str(error).strip(), flags=re.DOTALL)
        raise InvalidInput(f"{path}: {where}: {why}.") from error
    return found


def _named(data: Any) -> Any:
    """Make every key text: yaml reads 1 as a number."""
    if isinstance(data, dict):
        return {str(key): _named(value) for key, value in data.items()}
    return [_named(value) for value in data] if isinstance(data, list) else data
