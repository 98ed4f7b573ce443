"""The command line that asks for a trial's settings again, made of what was recorded of them."""

import ast
import contextlib
import dataclasses
import functools
import re
import shlex
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, get_args

import yaml

from lora_lab.composition.compose import CONF
from lora_lab.composition.keys import GROUPS as GROUPS_OF_CONFIG
from lora_lab.config import TrialConfig
from lora_lab.store.record import plain

_DROPPED = frozenset(
    (
        *("repeat", "repeats", "seed", "resume", "timeout_minutes"),
        *(f"measure.{name}" for name in ("idle_seconds", "board_power_watts", "price_per_kwh", "co2_grams_per_kwh")),
    )
)
"""What says where, how often or with which seed: no part of a configuration, and no part of its digest but for the
seed."""

_FREE = ("model.architecture", "model.package", "optimizer.args")
"""Dictionaries whose keys a group's option decides."""

_WORDS = re.compile("null|true|false|nan|inf", re.IGNORECASE)
"""What Hydra takes for something else than text."""

_GROUPS = tuple(group for group in GROUPS_OF_CONFIG if group != "tracking")


def command(params: Mapping[str, str], recorded: str = "") -> str:
    """The shortest command line that composes to these settings, window and all; one trial, not a sweep.

    A trial's own command line may name a sweep's preset, which would start that sweep anew; so this is made of the
    recorded settings and the options under conf/.

    Args:
        params: as recorded: the options chosen, and every setting under its dotted key.
        recorded: the trial's own command line: taken where an option is not among those under conf/.
    """
    words = ["python -m lora_lab"]
    try:
        default = _choices()
        chosen = {group: params.get(group, default[group]) for group in _GROUPS}
        words += [f"{group}={chosen[group]}" for group in _GROUPS if chosen[group] != default[group]]
        there = _settings(tuple(chosen.items()))
    except OSError:
        return recorded
    wanted = {key: text for key, text in params.items() if key not in _GROUPS and key not in _DROPPED}
    wanted = {key: text for key, text in wanted.items() if not re.match(r"tracking(\.|$)", key)}
    words += [shlex.quote(word) for word in _overrides(wanted, there)]
    return " ".join(words)


def _overrides(wanted: Mapping[str, str], there: Mapping[str, str]) -> Iterator[str]:
    """What turns the settings that are `there` into those `wanted`. A setting of only one of them is another
    version's, but for dictionaries of any keys."""
    for key, text in wanted.items():
        if key in there and not key.startswith(_FREE) and not _same(text, there[key]):
            yield f"{key}={_written(_value(key, text))}"
    for free in _FREE:
        yield from _dictionary(free, _below(wanted, free), _below(there, free))


def _dictionary(name: str, wanted: Mapping[str, str], there: Mapping[str, str]) -> Iterator[str]:
    """The same for a dictionary of any keys, whose leaves these are."""
    if not wanted:
        return
    if wanted.get(name) == "None":
        yield from [] if wanted == there else [f"{name}=null"]
        return
    keys = {key: text for key, text in wanted.items() if key != name}  # itself where it is empty
    yield from (f"~{key}" for key in there if key not in wanted and key != name)
    for key, text in keys.items():
        if not _same(text, there.get(key, "")):
            yield f"{'' if key in there else '+'}{key}={_written(_value(key, text))}"


def _below(settings: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: text for key, text in settings.items() if key == name or key.startswith(f"{name}.")}


@functools.cache
def _choices() -> dict[str, str]:
    """The option of each group in conf/config.yaml."""
    defaults = yaml.safe_load((CONF / "config.yaml").read_text("utf-8"))["defaults"]
    return {group: str(option) for entry in defaults if isinstance(entry, dict) for group, option in entry.items()}


@functools.cache
def _settings(chosen: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Every setting when these options are chosen and nothing else is said, as records write them.

    Raises: OSError when an option has no file."""
    tree = plain(TrialConfig())
    for group, option in chosen:
        told = yaml.safe_load((CONF / group / f"{option}.yaml").read_text("utf-8"))
        tree[group] = _merged(tree[group], told)
    return dict(_leaves(tree, ""))


def _merged(under: Any, over: Any) -> Any:
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return {key: _merged(under.get(key), over[key]) if key in over else under[key] for key in under | over}


def _leaves(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key, str(node)


def _same(one: str, other: str) -> bool:
    """Equal as settings: a yaml file may write 32 for 32.0."""
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


def _value(key: str, text: str) -> Any:
    """A setting from what str() made of it."""
    if text == "None" or not _is_text(key):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
    return text


@functools.cache
def _is_text(key: str) -> bool:
    """Whether the schema says that this setting is text, whatever it looks like: a commit can look like a number."""
    hint: Any = TrialConfig
    for part in key.split("."):
        schema = next((one for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)), None)
        if schema is None:
            return False
        hint = next((field.type for field in dataclasses.fields(schema) if field.name == part), None)
    return hint is str or (isinstance(hint, UnionType) and str in get_args(hint))


def _written(value: Any) -> str:
    """A value in the words of Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_written(inner) for inner in value) + "]"
    text = str(value)
    if isinstance(value, str) and (not re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./@+-]*", text) or _WORDS.fullmatch(text)):
        escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
        return f"'{escaped}'"
    return text
