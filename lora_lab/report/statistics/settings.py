"""Settings of trials: which trials belong to one point, and how to label a point among others."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence, Set

from lora_lab.report.statistics.factors import NO_EFFECT
from lora_lab.store.naming import OPTIONS, point_name
from lora_lab.store.trials import Trial

_SHAPE = ("batch_size", "seq_len")

ABSENT = "absent"
"""Value of a setting that a trial's version did not have."""

Settings = tuple[tuple[str, str], ...]
"""Keys and values, by key: equal for trials of one point."""


def settings(trial: Trial, known: frozenset[str] | None = None) -> Settings:
    """Return the settings that determine the trial's figures, of the keys that are `known` to all (by default, of its
    own)."""
    return tuple(
        (key, value) for key, value in sorted(trial.params.items()) if _decides(key) and (known is None or key in known)
    )


@functools.cache
def _decides(key: str) -> bool:
    """Return whether a setting determines figures. The name of a `measure` option adds nothing to its settings."""
    return key != "measure" and not {key, key.partition(".")[0]} & NO_EFFECT


def by_point(trials: Sequence[Trial], known: frozenset[str] | None = None) -> dict[Settings, list[Trial]]:
    """Group trials that are equal in everything but seed and repeat, in the order given."""
    found: dict[Settings, list[Trial]] = {}
    for trial in trials:
        found.setdefault(settings(trial, known), []).append(trial)
    return found


def labels(points: Sequence[Settings]) -> list[str]:
    """Return a label for each of these points: what distinguishes it from the others. Of settings that are no group's
    option and no shape, what most points have is left out."""
    told = [dict(point) for point in points]
    words = _differing(told)
    usual = {
        (key, value)
        for key in words
        for value, times in Counter(point.get(key, ABSENT) for point in told).items()
        if key not in (*OPTIONS, *_SHAPE) and 2 * times > len(points)
    }
    return [_name(point, words, usual) or _name(point, words, set()) or "the only point" for point in told]


def _differing(points: Sequence[Mapping[str, str]]) -> list[str]:
    """Return keys in which the points differ, without those that the option chosen for their group explains."""
    keys = sorted({key for point in points for key in point})
    values = {key: [point.get(key, ABSENT) for point in points] for key in keys}
    varied = [key for key in keys if len(set(values[key])) > 1]

    def explained(key: str) -> bool:
        group = key.partition(".")[0]
        pairs = set(zip(values[group], values[key], strict=True)) if group in varied and group != key else set()
        return bool(pairs) and len(pairs) == len({option for option, _ in pairs})

    return [key for key in varied if not explained(key)]


def _name(point: Mapping[str, str], keys: Sequence[str], usual: Set[tuple[str, str]]) -> str:
    """Name a point by these keys without its usual settings; batch size and row length always together."""
    shape = _SHAPE if set(_SHAPE) & set(keys) else ()
    told = {key: point.get(key, ABSENT) for key in dict.fromkeys((*keys, *shape))}
    return point_name({key: value for key, value in told.items() if (key, value) not in usual})
