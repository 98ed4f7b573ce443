"""From yaml and command line to a TrialConfig: the schema's place in Hydra, and refusals in plain words."""

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.composition.explanations import explain
from lora_lab.composition.keys import GROUPS as GROUPS
from lora_lab.composition.keys import group_of, unknown_key
from lora_lab.composition.keys import known_keys as known_keys
from lora_lab.composition.validation import faults
from lora_lab.config import InvalidInput, TrialConfig

_HERE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (_HERE / "conf", _HERE.parent / "conf") if folder.is_dir())
"""The yaml files: inside an installed wheel, beside the package in a clone."""


def register_schema() -> None:
    """Put the schema where conf/config.yaml names it, so that Hydra checks every yaml against it."""
    ConfigStore.instance().store(name="schema", node=TrialConfig)


def load(composed: DictConfig) -> TrialConfig:
    """Check a composed config and turn it into typed data.

    Raises: InvalidInput with every fault found, one a line.
    """
    unknown = list(_unknown_keys(OmegaConf.to_container(composed, resolve=False), TrialConfig))
    if unknown:
        raise InvalidInput(*(unknown_key(key) for key in unknown))
    try:
        config = cast(TrialConfig, OmegaConf.to_object(composed))
    except (OmegaConfBaseException, RecursionError) as error:
        raise InvalidInput(explain(error)) from error
    _expand_home(config)
    found = faults(config)
    if found:
        raise InvalidInput(*found)
    return config


def _expand_home(config: TrialConfig) -> None:
    """Understand ~/ at the start of a path from a yaml; on the command line it has been understood already."""
    for group, key in ((config.data, "path"), (config.model, "path"), (config.tracking, "root")):
        path = getattr(group, key)
        if path and path.startswith("~/"):
            with suppress(RuntimeError):  # nobody knows where home is
                setattr(group, key, str(Path(path).expanduser()))


def _unknown_keys(node: Any, schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of `node` that the dataclass does not have (`+group.typo=1` gets past Hydra)."""
    fields = {f.name: group_of(f.type) for f in dataclasses.fields(schema)}
    for key, value in node.items():
        if key not in fields:
            yield f"{prefix}{key}"
        elif fields[key] and isinstance(value, dict):
            yield from _unknown_keys(value, fields[key], f"{prefix}{key}.")
