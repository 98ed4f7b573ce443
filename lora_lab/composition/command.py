"""Write the shortest command line that composes to a trial's configuration."""

import functools
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import OmegaConf

from lora_lab.composition.arguments import quoted
from lora_lab.composition.compose import CONF
from lora_lab.composition.keys import GROUPS
from lora_lab.config import TrialConfig
from lora_lab.settings import Effect, settings_of
from lora_lab.store.record import plain

_FREE = ("model.architecture", "model.package", "optimizer.args")
"""Dictionaries whose keys a group's option decides."""

_WHOLE = ("method.rank_pattern", "method.alpha_pattern")
"""Dictionaries that are written as one, because names of modules have dots."""

_WORDS = re.compile("null|true|false|nan|inf", re.IGNORECASE)
"""Texts that Hydra reads as something else."""

_HYDRAS_OWN = ("hydra", "main", "schema")
_CONFIG_DIR = "command-line"
"""Hydra's name for the folder of --config-dir."""

_Places = tuple[tuple[str, str, str], ...]
"""Provider, schema (file or pkg) and path of folders with the user's own yaml files."""

_LEFT_OUT = {"seed", *(each.key for each in settings_of(TrialConfig) if each.effect is Effect.none)}


def shortest_command(config: TrialConfig, choices: Mapping[str, str], sources: Iterable[Any] = ()) -> str:
    """Return the shortest command line for this configuration: one trial, whatever sweep or seed it came from.

    Args:
        choices: the chosen option of each group.
        sources: where Hydra found its yaml files (`hydra.runtime.config_sources`).
    """
    places = tuple((each.provider, each.schema, each.path) for each in sources if each.provider not in _HYDRAS_OWN)
    default, _ = _composed((), places)
    chosen = tuple(f"{g}={choices[g]}" for g in GROUPS if g not in _LEFT_OUT and choices[g] != default[g])
    _, there = _composed(chosen, places)
    wanted = dict(_leaves(plain(config), ""))
    words = [*_named(places), *chosen, *_overrides(wanted, dict(there))]
    return " ".join(["python -m lora_lab", *map(shlex.quote, words)])


def _named(places: _Places) -> Iterator[str]:
    """Yield the words that name the user's own folders."""
    yield from (f"--config-dir={os.path.relpath(path)}" for provider, _, path in places if provider == _CONFIG_DIR)
    searched = [f"{schema}://{path}" for provider, schema, path in places if provider != _CONFIG_DIR]
    if searched:
        yield f"hydra.searchpath={_written(searched)}"


@functools.lru_cache(maxsize=64)
def _composed(words: tuple[str, ...], places: _Places) -> tuple[dict[str, str], tuple[tuple[str, Any], ...]]:
    """Return the options and the settings that these words compose to."""
    search = create_config_search_path(str(CONF))
    for provider, schema, path in places:
        search.prepend(provider, f"{schema}://{path}", anchor="schema")
    composed = ConfigLoaderImpl(search).load_configuration("config", list(words), RunMode.RUN)
    settings = OmegaConf.to_container(composed, enum_to_str=True)
    assert isinstance(settings, dict)
    choices = {group: str(option) for group, option in settings.pop("hydra")["runtime"]["choices"].items()}
    return choices, tuple(_leaves(settings, ""))


def _overrides(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """Yield what turns the settings that are `there` into those `wanted`."""
    for key, value in wanted.items():
        if not {key, key.partition(".")[0]} & _LEFT_OUT and not key.startswith(_FREE) and value != there.get(key):
            yield f"{key}={_written(value)}"
    for free in _FREE:
        yield from _dictionary(free, _below(wanted, free), _below(there, free))


def _dictionary(name: str, wanted: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """Do the same for a dictionary of any keys, given by its leaves."""
    if wanted.get(name, {}) is None:
        yield from [] if there.get(name, {}) is None else [f"{name}=null"]
        return
    keys = {key: value for key, value in wanted.items() if key != name}  # itself where it is empty
    yield from (f"~{key}" for key in there if key not in wanted and key != name)
    for key, value in keys.items():
        if key not in there or value != there[key]:
            yield f"{'' if key in there else '+'}{key}={_written(value)}"


def _below(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key == name or key.startswith(f"{name}.")}


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node and key not in _WHOLE:
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key, node


def _written(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_written(inner) for inner in value) + "]"
    text = str(value)
    if isinstance(value, str) and (not re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./@+-]*", text) or _WORDS.fullmatch(text)):
        return quoted(text)
    return text
