"""Name a point by its settings. Tables, MLflow, the report and best use the same words.

`adamw bf16 1x512`: options appear by name, batch size and row length as a shape, and everything else as key=value. What
people look for first comes first, because lists cut names off."""

from collections import Counter
from collections.abc import Iterable, Mapping

OPTIONS = ("optimizer", "precision", "engine", "method", "model", "data")
"""Groups whose options are clear by their names alone."""

_SHAPE = ("batch_size", "seq_len")
_ORDER = ("optimizer", "precision", "engine", "shape", "method", "model", "data")


def point_name(values: Mapping[str, str]) -> str:
    """Return the name of a point; empty without any setting.

    Args:
        values: the settings that distinguish it from other points, by dotted key.
    """
    there = dict(values)
    if all(key in there for key in _SHAPE):
        there["shape"] = "x".join(there.pop(key) for key in _SHAPE)
    leaves = Counter(key.rpartition(".")[2] for key in there)
    return " ".join(word(key, there[key], full=leaves[key.rpartition(".")[2]] > 1) for key in in_order(there))


def trial_name(point: str, repeat: int) -> str:
    """Return the name of a point's trial. The first repeat has the point's name.

    Args:
        repeat: from 0.
    """
    return f"{point} #{repeat + 1}" if repeat else point


def word(key: str, value: str, full: bool = False) -> str:
    """Return one setting as a part of a name, with its whole dotted key if `full`."""
    if key == "shape" or (key in OPTIONS and value.split() == [value]):
        return value
    return f"{key if full else key.rpartition('.')[2]}={value}"


def in_order(keys: Iterable[str]) -> list[str]:
    """Return keys in the order in which a name lists them. Keys without a fixed position come last, in the order
    given."""
    return sorted(keys, key=lambda key: _ORDER.index(key) if key in _ORDER else len(_ORDER))
