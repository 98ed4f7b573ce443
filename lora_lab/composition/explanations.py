"""Explain in plain words why Hydra did not compose what was typed."""

import json
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import yaml
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.composition.arguments import in_shell, quoted, unreadable
from lora_lab.composition.keys import GROUPS, known_keys, unknown_key
from lora_lab.config import InvalidInput, TrialConfig

_HYDRA_ASIDES = re.compile(r"\n(Config search path:(\n\t.*)*|Set the environment variable HYDRA_FULL_ERROR.*)")
_DETAILS = re.compile(r"\n\s+(full_key: .*|reference_type=.*|object_type=.*)")


COMPOSITION_ERRORS = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError, AttributeError),
    *(AssertionError, LookupError, ArithmeticError, ImportError, RuntimeError, EOFError),
)
"""Errors that Hydra and OmegaConf raise for an odd command line or yaml; they check little before they use it."""

_OPEN = ("optimizer.args", "model.architecture", "hydra.sweeper.params")
"""Dictionaries that take any keys."""


_SOURCES = (
    "data.sources is a list of sources, each with its path or its id on the hub, and perhaps with a weight and a "
    "split. Write for example 'data.sources=[{path: a.jsonl, weight: 0.7}, {id: NAME, weight: 0.3}]'."
)


def explain(error: Exception) -> str:
    """Say in plain words what was wrong with a command line, or with a yaml that it names."""
    text = str(error).strip()
    if isinstance(error, InvalidInput):
        return text
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}. Correct the yaml."
    if isinstance(error, RecursionError):
        return "a value refers to itself with ${...}; write it out in one of the places."
    if isinstance(error, HydraException):
        cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        return _of_composition(f"{text}{cause}".strip())
    if isinstance(error, OmegaConfBaseException):
        key = f"{error.full_key}: " if error.full_key else ""
        return f"{key}{_without_details(text)}."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be used ({error.strerror})."
    if isinstance(error, (OSError, UnicodeDecodeError, yaml.YAMLError)):
        which = ", ".join(map(str, _broken_yamls())) or "a yaml"
        return f"{which}: not a yaml with keys and values in UTF-8 ({text})."
    if "Config group override must be a string" in text:
        return "A group takes the name of one of its options, as in optimizer=adamw; --help lists them."
    if isinstance(error, ValueError):
        return text
    what = f"{type(error).__name__}: {text}".partition("\n")[0]
    return f"Hydra cannot compose this ({what}). Put HYDRA_FULL_ERROR=1 before the command to see where."


def _of_composition(refusal: str) -> str:
    """Replace Hydra's advice to append unknown keys.

    `+key=value` would only fail one step later, so name the nearest existing key instead.
    """
    if re.search(r"(Could not override '|Error merging override )data\.sources", refusal):
        return _SOURCES
    if re.search(r"Error merging override data\.path=\[", refusal):
        return f"data.path is one file or folder. {_SOURCES}"
    unknown = re.search(r"Could not override '([^']*)'", refusal)
    within = re.search(r"\nKey '(.+)' (?:not in '|is not in struct)", refusal)
    if unknown and (unknown[1] in _OPEN or unknown[1].rpartition(".")[0] in _OPEN):
        return f"'{unknown[1]}' is not set yet; to add it, write +{unknown[1]}=..."
    if unknown and unknown[1] in known_keys() and within:
        return unknown_key(f"{unknown[1]}.{within[1]}")
    if unknown and unknown[1] not in GROUPS:
        return unknown_key(unknown[1])
    twice = re.search(r"Multiple values for (\S+)\. .* 'override [^:]+: (.+)'", refusal)
    if twice:
        return f"'{twice[1]}' has an option already; to choose another, write {twice[1]}={twice[2]} without a +."
    largest = re.search(
        r"(?:Error merging override|Sweep parameters|argument) '?\+*(batch_size|seq_len)=(choice\()?max", refusal
    )
    if largest:
        return (
            f"{largest[1]}=max takes several trials to find the largest value that the card takes. Add -m: python -m "
            f"lora_lab -m {largest[1]}=max. A single trial and other commands need a number."
        )
    sweep = re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'", refusal)
    if sweep:
        return _several(sweep[1])
    unasked = re.search(r"unexpected keyword argument '(\w+)'.*\n *full_key: (\S+)", refusal)
    if unasked:
        return f"'{unasked[2]}.{unasked[1]}' is not a setting of this {unasked[2].rpartition('.')[2]}; leave it out."
    mistyped = re.search(r"Error merging override (.+)\n(.+)\n +full_key: (\S+)", refusal)
    if mistyped:
        return f"{mistyped[1]}: {mistyped[2].rstrip('.')}.{_default(mistyped[3])}"
    in_yaml = re.search(r"In '(.+)': \w+ raised while composing config:\n(.+)(?:\n +full_key: (\S+))?", refusal)
    if in_yaml:
        return f"{_place(in_yaml[1], in_yaml[3] or '')}: {in_yaml[2].rstrip('.')}."
    return _without_details(_HYDRA_ASIDES.sub("", refusal))


def _several(override: str) -> str:
    """Explain several values where one is needed: a sweep without -m, a list without brackets, or a text with
    commas."""
    key, _, value = override.partition("=")
    said = f"{override} gives several values. Add -m for a sweep over them"
    if "(" in value:
        return f"{said}."
    if key == "data.path":
        sources = ", ".join(f"{{path: {path.strip()}}}" for path in value.split(","))
        return f"{said}; to train on all of them, write 'data.sources=[{sources}]'."
    return f"{said}; for one list, write {key}=[{value}]; for one text, {in_shell(f'{key}={quoted(value)}')}."


def _without_details(text: str) -> str:
    """Return an error's text without OmegaConf's notes on types and the names of intermediate errors."""
    text = _DETAILS.sub("", text).strip().rstrip(".")
    text = text.replace("is incompatible with type hint 'Union[int, str]'", "is neither a whole number nor text")
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", text).strip('"')


def _default(key: str) -> str:
    """Return the schema's default for a dotted key, as it is written on the command line; nothing for Hydra's keys."""
    if key.partition(".")[0] == "hydra":
        return ""
    value = OmegaConf.select(OmegaConf.structured(TrialConfig), key)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    written = value.name if isinstance(value, Enum) else json.dumps(value).replace('"', "")
    return f" By default it is {key}={written}."


def _config_dir() -> Path | None:
    """Return the folder that --config-dir names."""
    named = get_args_parser().parse_known_args(sys.argv[1:])[0].config_dir
    return Path(named) if named else None


def _broken_yamls() -> Iterator[Path]:
    """Yield the yamls below --config-dir that cannot be read, for errors that name no file."""
    folder = _config_dir()
    for file in sorted(folder.rglob("*.yaml")) if folder else []:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            yield file
        else:
            if not isinstance(content, dict | list | str | None):
                yield file


def _place(config_path: str, key: str) -> str:
    """Return a user's yaml and the line where it sets a key; the option's name where that cannot be found."""
    folder = _config_dir()
    file = folder / f"{config_path}.yaml" if folder else None
    if file is None or not file.is_file():
        return config_path
    name = key.rpartition(".")[2].partition("[")[0]
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, start=1) if re.match(rf"\s*{re.escape(name)}\s*:", line)]
    return f"{file}, line {found[0]}" if len(found) == 1 else f"{file}, {key}".removesuffix(", ")
