"""Read what was typed: options anywhere, ~ as the home folder, and the quoting that Hydra's grammar needs."""

import difflib
import math
import os
import re
import shlex
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException

from lora_lab.config import InvalidInput

_SHELLS = "[$`!]"
"""Characters that a shell also replaces within double quotes."""


def in_order(typed: Sequence[str], own: Sequence[str] = ()) -> list[str]:
    """Put options with their values before the overrides, because argparse accepts overrides only on one side of an
    option.

    Args:
        own: the command's own options, which were taken out of `typed`; a message names those that are near.

    Raises: InvalidInput for an option that Hydra does not have; SystemExit, as argparse does, for an option's wrong
    value.
    """
    parser = get_args_parser()
    found, unknown = parser.parse_known_intermixed_args(list(typed))
    if unknown:
        every = [*own, *(option for action in parser._actions for option in action.option_strings)]
        raise InvalidInput(*(_no_option(word, every) for word in unknown))
    if found.experimental_rerun is not None:
        raise InvalidInput("--experimental-rerun is not supported; type the command that the tag 'command' has.")
    options = []
    for action in parser._actions:
        value = getattr(found, action.dest, None)
        if action.option_strings and value not in (None, False):
            option = action.option_strings[0]
            options.append(option if value is True else f"{option}={value}")
    return [*options, *(_searched(_one_text(_at_home(override))) for override in found.overrides)]


def _no_option(typed: str, every: Sequence[str]) -> str:
    near = difflib.get_close_matches(typed.partition("=")[0], every, n=1, cutoff=0.75)
    if near:
        return f"'{typed}' is not an option of lora_lab. Did you mean {near[0]}?"
    setting = f" A setting has no dashes: {typed.lstrip('-')}." if "=" in typed else ""
    return f"'{typed}' is not an option of lora_lab.{setting} --hydra-help lists the options, --help the settings."


def _at_home(override: str) -> str:
    """Expand ~/ at the start of an override's values, as a shell would."""
    key, equals, value = override.partition("=")
    try:
        home = str(Path.home())
    except RuntimeError:  # nobody knows
        return override
    expanded = re.sub(r"""((?:^|[,\[])\s*['"]?)~(?=/)""", lambda start: start[1] + home, value)
    return f"{key}{equals}{expanded}"


def _one_text(override: str) -> str:
    """Keep contrast=optimizer,precision one text and cotrain=rank,alpha one list: Hydra would take them for a sweep
    over two."""
    key, _, value = override.partition("=")
    if key == "cotrain" and re.fullmatch(r"[\w,]+", value) and value != "null":
        return f"{key}=[{value}]"
    is_list = key == "contrast" and "," in value and not re.search(r"""['"\[\]]""", value)
    return f"{key}={quoted(value)}" if is_list else override


def _searched(override: str) -> str:
    """Make batch_size=max and seq_len=max values of a sweep, which Hydra does not compose with the rest of its config:
    max is no number."""
    return re.sub(r"^(\+*(?:batch_size|seq_len)=)max$", r"\1choice(max)", override)


def as_typed(override: str) -> str:
    """Undo this."""
    return override.replace("=choice(max)", "=max")


def quoted(text: str) -> str:
    """Quote a value so that Hydra's grammar takes it as text; with quotes that suit a shell where both kinds work."""
    quote = Quote.double if re.search(rf"'|{_SHELLS}", text) and '"' not in text else Quote.single
    return QuotedString(text=text, quote=quote).with_quotes()


def unreadable(override: str) -> str:
    """Say why Hydra's grammar does not take an override, and what to type in a shell to give its value as text."""
    key, equals, value = override.partition("=")
    if not equals and os.path.lexists(override):  # Path's raises for a name that is too long
        path = shlex.quote(override)
        return f"'{override}' is a file or folder, not a setting. To train on it, write data=jsonl data.path={path}."
    if not equals:
        return f"'{override}' has no value. Write key=value without spaces around the =; --help lists them."
    if _fault(f"{key}=x"):
        return f"'{key}' is not the name of a setting. Write key=value, for example batch_size=2; --help lists them."
    advice = f"  {in_shell(f'{key}={quoted(value)}')}"
    if "," in value and not re.search(r"""[()\[\]{}'"]""", value):
        each = ",".join(quoted(part) for part in value.split(","))
        advice += f"\nor, if these are several values:\n  {in_shell(f'{key}={each}')}"
    return f"{override}: {_fault(override)}. If it is meant as text, type:\n{advice}"


def in_shell(argument: str) -> str:
    """Quote an argument for a shell; with double quotes, which are easier to read, where a shell leaves it
    unchanged."""
    if re.search(_SHELLS, argument):
        return shlex.quote(argument)
    return '"' + re.sub(r'(["\\])', r"\\\1", argument) + '"'


def _fault(override: str) -> str:
    """Return what Hydra's grammar does not accept; empty where it accepts the override."""
    try:
        OverridesParser.create().parse_rule(override, "override")
    except HydraException as error:
        text, start = str(error).strip(), getattr(error.__cause__, "startIndex", None)
        if start is not None:  # the lexer's; the parser's errors have no such thing
            return f"{override[start]!r} has to stand in quotes"
        if " while evaluating " in text:
            return text.partition(" while evaluating ")[2].replace("\n", ". ")
        token = re.search(r"input '(.*?)' expecting", text)
        if token and token[1] != "<EOF>":
            return f"{token[1]!r} cannot stand there"
        return "a bracket, a brace or a quote is not closed"
    return ""


MOST_POINTS = 10_000
"""More would take minutes to check before the first of them runs."""


def check_point_count(overrides: Sequence[Override], before: int) -> None:
    """Raise InvalidInput when a sweep over these has no point, or more than MOST_POINTS together with `before`."""
    counts: dict[str, int] = {}
    for override in overrides:
        count = _count(override)
        if count == 0:
            raise InvalidInput(f"{override.input_line} has no value. Name some, for example key=1,2.")
        counts[override.get_key_element()] = count
    points = before + math.prod(counts.values())
    if points > MOST_POINTS:
        raise InvalidInput(
            f"the sweep would have {points:,} points; {MOST_POINTS:,} is the most. Sweep fewer values, or run it in "
            "parts."
        )


def _count(override: Override) -> int:
    """Return how many values an override has; a range is not enumerated."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        raise InvalidInput(
            f"{override.input_line} means all numbers between two. Name the ones to try, for example "
            f"{override.get_key_element()}={value.start},{value.end}."
        )
    if not isinstance(value, RangeSweep):
        return sum(1 for _ in override.sweep_iterator()) if override.is_sweep_override() else 1
    edges = [value.start, value.stop, value.step]
    if not all(isinstance(edge, int) or (isinstance(edge, float) and math.isfinite(edge)) for edge in edges):
        raise InvalidInput(f"{override.input_line} has an end that is not a finite number.")
    start, stop, step = map(Fraction, map(str, edges))
    if step == 0:
        raise InvalidInput(f"{override.input_line} has steps of 0. Give another step.")
    return max(0, math.ceil((stop - start) / step))
