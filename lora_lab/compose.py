"""From yaml and command line to a TrialConfig: the schema's place in Hydra, and refusals in plain words."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, cast, get_args

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.config import RefusedInput, TrialConfig
from lora_lab.faults import faults

_HERE = Path(__file__).resolve().parent
CONF = next(folder for folder in (_HERE / "conf", _HERE.parent / "conf") if folder.is_dir())
"""The yaml files: inside an installed wheel, beside the package in a clone."""

GROUPS = tuple(f.name for f in dataclasses.fields(TrialConfig) if dataclasses.is_dataclass(f.type))
"""The groups a user chooses from: optimizer, precision, method, ..."""


def register_schema() -> None:
    """Put the schema where conf/config.yaml names it, so that Hydra checks every yaml against it."""
    ConfigStore.instance().store(name="schema", node=TrialConfig)


def load(composed: DictConfig) -> TrialConfig:
    """Check a composed config and turn it into typed data.

    Raises: RefusedInput with every fault found, one a line.
    """
    unknown = list(_unknown_keys(OmegaConf.to_container(composed, resolve=False), TrialConfig))
    if unknown:
        raise RefusedInput(*(_unknown_key(key) for key in unknown))
    try:
        config = cast(TrialConfig, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:
        raise RefusedInput(str(error)) from error
    found = faults(config)
    if found:
        raise RefusedInput(*found)
    return config


def _unknown_keys(node: Any, schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of `node` that the dataclass does not have (`+group.typo=1` gets past Hydra)."""
    fields = {f.name: _group_of(f.type) for f in dataclasses.fields(schema)}
    for key, value in node.items():
        if key not in fields:
            yield f"{prefix}{key}"
        elif fields[key] and isinstance(value, dict):
            yield from _unknown_keys(value, fields[key], f"{prefix}{key}.")


def _group_of(hint: Any) -> Any:
    """The dataclass in a field's type, also in `X | None`; None when there is none."""
    return next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)


def known_keys(schema: Any = TrialConfig, prefix: str = "") -> list[str]:
    """Every dotted key a user may set, groups included."""
    keys: list[str] = []
    for f in dataclasses.fields(schema):
        keys.append(f"{prefix}{f.name}")
        group = _group_of(f.type)
        if group:
            keys += known_keys(group, f"{prefix}{f.name}.")
    return keys


def _unknown_key(key: str) -> str:
    near = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}?" if near else "python -m lora_lab --cfg job lists every setting."
    return f"'{key}' is no setting of lora_lab. {hint}"


_HYDRA_ASIDES = re.compile(r"\n(Config search path:(\n\t.*)*|Set the environment variable HYDRA_FULL_ERROR.*)")


def explain(refusal: str) -> str:
    """Hydra's words for a refused command line, with its advice to append unknown keys replaced.

    `+key=value` would only be refused one step later, so the nearest existing key is named instead.
    """
    unknown = re.search(r"Could not override '([^']+)'", refusal)
    parent = unknown.group(1).rpartition(".")[0] if unknown else ""
    if unknown and parent in ("optimizer.args", "model.architecture"):
        return f"'{unknown[1]}' is not set yet; to add it, write +{unknown[1]}=..."
    if unknown and unknown.group(1) not in GROUPS:
        return _unknown_key(unknown.group(1))
    twice = re.search(r"Multiple values for (\S+)\. .* 'override [^:]+: (.+)'", refusal)
    if twice:
        return f"'{twice[1]}' has an option already; to choose another, write {twice[1]}={twice[2]} without a +."
    if "Config group override must be a string" in refusal:
        return "A group takes the name of one of its options, as in optimizer=adamw; --help lists them."
    mistyped = re.search(r"Error merging override (.+)\n(.+)\n +full_key: (\S+)", refusal)
    if mistyped:
        return f"{mistyped[1]}: {mistyped[2].rstrip('.')}. By default it is {_default(mistyped[3])}."
    return _HYDRA_ASIDES.sub("", refusal).strip()


def _default(key: str) -> str:
    """What the schema has for a dotted key, as it is written on the command line."""
    value = OmegaConf.select(OmegaConf.structured(TrialConfig), key)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    written = value.name if isinstance(value, Enum) else json.dumps(value).replace('"', "")
    return f"{key}={written}"
