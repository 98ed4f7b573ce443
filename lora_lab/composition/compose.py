"""Turn yaml and command line into a TrialConfig, or into messages in plain words."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.composition.explanations import explain
from lora_lab.composition.keys import help_text, unknown_key
from lora_lab.composition.validation import faults
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.options import DataSource
from lora_lab.settings import settings_of

_HERE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (_HERE / "conf", _HERE.parent / "conf") if folder.is_dir())
"""The yaml files: inside an installed wheel, next to the package in a clone."""


def register_schema() -> None:
    """Put the schema where conf/config.yaml names it: Hydra checks every yaml against it, and --help shows it."""
    ConfigStore.instance().store(name="schema", node=TrialConfig)
    OmegaConf.register_new_resolver("settings", help_text, replace=True)


def load(composed: DictConfig) -> TrialConfig:
    """Check a composed config and turn it into typed data.

    Raises: InvalidInput with every fault found, one per line.
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


def stored_config(path: Path) -> TrialConfig:
    """Read the config that a trial wrote into its folder.

    A relative path of rows or of a model that leads nowhere from here is looked for from the folders that the trial's
    folder lies in: one of them is most likely where the trial was started.

    Raises: InvalidInput when it cannot be read, or is of another version."""
    try:
        stored = OmegaConf.create(_as_named_now(yaml.safe_load(path.read_text(encoding="utf-8"))))
        config = load(cast(DictConfig, OmegaConf.merge(OmegaConf.structured(TrialConfig), stored)))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as fault:
        raise InvalidInput(f"{path} cannot be read, or was edited, or another version wrote it: {fault}") from fault
    for group, key in _paths(config):
        typed = getattr(group, key)
        if typed and not Path(typed).exists():  # joined to another folder, an absolute path stays as it is
            found = next((each / typed for each in path.absolute().parents if (each / typed).exists()), None)
            setattr(group, key, typed if found is None else str(found))
    return config


def _as_named_now(stored: Any) -> Any:
    """Return a config from before method.b_learning_rate_ratio, which was train.lora_plus_ratio, as it would be now."""
    train = stored.get("train") if isinstance(stored, dict) else None
    if isinstance(train, dict) and "lora_plus_ratio" in train and isinstance(stored.get("method"), dict):
        stored["method"].setdefault("b_learning_rate_ratio", train.pop("lora_plus_ratio"))
    return stored


def _paths(config: TrialConfig) -> list[tuple[Any, str]]:
    """Return the settings that are paths of the user's files, each with its group."""
    paths: list[tuple[Any, str]] = [(config.data, "heldout_path"), (config.model, "path")]
    if config.data.source is not DataSource.shipped:  # there it is a name
        paths.append((config.data, "path"))
    return [*paths, *((source, "path") for source in config.data.sources)]


def _expand_home(config: TrialConfig) -> None:
    """Expand ~/ at the start of a path from a yaml; on the command line it is expanded already."""
    for group, key in [*_paths(config), (config.tracking, "root")]:
        path = getattr(group, key)
        if path and path.startswith("~/"):
            with suppress(RuntimeError):  # nobody knows where home is
                setattr(group, key, str(Path(path).expanduser()))


def _unknown_keys(node: Any, schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield dotted keys of `node` that the dataclass does not have (`+group.typo=1` gets past Hydra)."""
    groups = {each.key: each.group for each in settings_of(schema) if "." not in each.key}
    for key, value in node.items():
        if key not in groups:
            yield f"{prefix}{key}"
        elif groups[key] and isinstance(value, dict):
            yield from _unknown_keys(value, groups[key], f"{prefix}{key}.")
