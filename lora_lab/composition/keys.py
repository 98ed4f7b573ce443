"""The dotted keys that can be set, as the schema has them."""

import dataclasses
import difflib
from typing import Any, get_args

from lora_lab.config import TrialConfig

GROUPS = tuple(f.name for f in dataclasses.fields(TrialConfig) if dataclasses.is_dataclass(f.type))
"""The groups a user chooses from: optimizer, precision, method, ..."""


def known_keys(schema: Any = TrialConfig, prefix: str = "") -> list[str]:
    """Every dotted key a user may set, groups included."""
    keys: list[str] = []
    for f in dataclasses.fields(schema):
        keys.append(f"{prefix}{f.name}")
        group = group_of(f.type)
        if group:
            keys += known_keys(group, f"{prefix}{f.name}.")
    return keys


def group_of(hint: Any) -> Any:
    """The dataclass in a field's type, also in `X | None`; None when there is none."""
    return next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)


def unknown_key(key: str) -> str:
    """Say that a key is no setting, and which one is near."""
    if key.partition(".")[0] == "hydra":
        return f"'{key}' is no setting of Hydra. python -m lora_lab --cfg hydra lists them."
    near = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}?" if near else "python -m lora_lab --cfg job lists every setting."
    return f"'{key}' is no setting of lora_lab. {hint}"
