"""What was varied, and which of its effects can be separated."""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import linalg
from scipy.sparse import csgraph

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.settings import Effect, settings_of
from lora_lab.store.trials import Sweep, Trial

SHAPE = ("batch_size", "grad_accum_steps", "seq_len")
"""Settings whose product is the tokens per step."""

TOKENS = "tokens per step"

NO_EFFECT = frozenset(each.key for each in settings_of(TrialConfig) if each.effect is not Effect.result) | {
    "repeat",
    "capacity",  # one name for vram_limit_gib
    "memory",  # one name for several settings
}
"""Settings that cannot change what is compared. They are not factors; trials that differ only in them are repeats."""

_Keys = tuple[str, ...]
_ORDER = ("optimizer", "precision", "engine", "method", "model", "data", "measure")


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A setting that varied, or several aliased ones."""

    name: str
    """A setting's key; "shape" for batch_size x seq_len; names joined by " + " if they are aliased."""
    keys: tuple[str, ...]
    """The settings (parameters) it consists of."""
    levels: tuple[str, ...]
    """In the requested order, else numbers by size and words by the alphabet; shapes by their tokens per step.
    The first is the baseline. Where none is named, it is the first level that has a measured trial, of a merged factor
    (whose levels have no order of their own) that which has most."""

    def level(self, trial: Trial) -> str:
        """Return the trial's level: "2x512" for shape, values joined by " + " for several settings."""
        return " + ".join(_parts(self.keys, trial.params).values())


def taken_apart(factor: Factor, trials: Sequence[Trial]) -> list[Factor]:
    """Return the settings that a factor consists of, each by itself; shape stays whole."""
    shape = tuple(key for key in factor.keys if key in SHAPE)
    parts = [("shape", shape)] if shape else []
    parts += [(key, (key,)) for key in factor.keys if key not in SHAPE]
    made = [Factor(name=name, keys=keys, levels=()) for name, keys in parts]
    return [replace(each, levels=tuple(dict.fromkeys(each.level(trial) for trial in trials))) for each in made]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confounded:
    """Settings whose effects are aliased in this design."""

    names: tuple[str, ...]
    """Their names; "tokens per step" is among them where it is one of the candidates."""
    why: str
    """In words: "tokens per step is batch_size x seq_len", "they changed together in every trial", ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What varied between trials; aliased settings count as one factor."""

    factors: tuple[Factor, ...]
    confounded: tuple[Confounded, ...]
    fixed: Mapping[str, str]
    """Settings that were the same in all trials: groups by their choice, without the settings under them."""
    notes: tuple[str, ...] = ()
    """Notes: factors that varied only among trials without figures."""


def tied(points: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Return groups of settings whose main effects are aliased at these points: none in a full factorial, except the
    shape's.

    A point is a level for each setting. Where batch_size, grad_accum_steps or seq_len vary, "tokens per step" (its
    logarithm) is one more candidate. Main effects make a matrix: a column for each level of a setting but one. Its
    null space is what could be shifted between settings with no point showing it; a setting that has no part in it
    can be separated from all others. The rest falls into the smallest groups that shift nothing between each other.
    """
    names = list(dict.fromkeys(key for point in points for key in point))
    rows = list(dict.fromkeys(tuple(point.get(name, "None") for name in names) for point in points))
    columns = {name: _indicators([row[at] for row in rows]) for at, name in enumerate(names)}
    columns[TOKENS] = _log_tokens([dict(zip(names, row, strict=True)) for row in rows])
    found = [name for name, block in columns.items() if block.shape[1]]
    if not found:
        return []
    matrix = np.hstack([columns[name] for name in found])
    matrix -= matrix.mean(axis=0)  # takes the intercept out
    matrix /= np.linalg.norm(matrix, axis=0)
    null = linalg.null_space(np.linalg.qr(matrix, mode="r"), rcond=1e-9)  # of the triangle: the same, and small
    shifts = np.abs(null @ null.T) > 1e-7  # the projection onto the null space is the same for every basis
    of = np.repeat(np.eye(len(found)), [columns[name].shape[1] for name in found], axis=0)
    _, label = csgraph.connected_components(of.T @ shifts @ of, directed=False)
    parts = [tuple(name for name, at in zip(found, label, strict=True) if at == part) for part in range(max(label) + 1)]
    return [part for part in parts if len(part) > 1]


def design(trials: Sequence[Trial], sweeps: Sequence[Sweep] = (), baseline: Mapping[str, str] | None = None) -> Design:
    """Find what varied and which of its effects can be separated, by the rank of the main-effects matrix.

    Settings and levels are those of all `trials`; the rank is of those that finished and are not invalid.

    Args:
        baseline: settings (factors' names or keys; shape=1x512) and the level that comes first.

    Raises: InvalidInput when `baseline` names a setting or level that no trial has."""
    measured = [trial for trial in trials if trial.finished and trial.tags.get("validity") != "invalid"]
    sweeps = sorted(sweeps, key=lambda sweep: sweep.started_ms)
    varied = _varied(trials, sweeps)
    blocks = _merged(_blocks(varied), measured)
    factors = [_factor(keys, trials, measured, sweeps) for keys in blocks]
    for setting, level in (baseline or {}).items():
        _check_known(setting, level, factors, trials)
    confounded = [_confounded(keys, varied, trials, measured) for keys in blocks if len(keys) > 1]
    return Design(
        factors=tuple(_from(factor, baseline or {}, trials) for factor in factors),
        confounded=tuple(confounded),
        fixed=_fixed(trials),
        notes=tuple(note for factor in factors if (note := _note(factor, measured))),
    )


def tokens_a_step(params: Mapping[str, str]) -> int:
    """Slots of an optimizer step: batch_size x grad_accum_steps x seq_len, 1 for what is not given."""
    return math.prod(int(params.get(key, "1")) for key in SHAPE)


def _indicators(values: Sequence[str]) -> np.ndarray:
    """Return a column for each level but one; none where nothing varies."""
    levels = sorted(set(values))
    return np.array([[float(value == level) for level in levels[1:]] for value in values]).reshape(len(values), -1)


def _log_tokens(points: Sequence[Mapping[str, str]]) -> np.ndarray:
    nothing = np.empty((len(points), 0))
    if not all(point.get(key, "1").isdecimal() and int(point.get(key, "1")) for point in points for key in SHAPE):
        return nothing
    tokens = [tokens_a_step(point) for point in points]
    return np.log2(np.array(tokens, dtype=float))[:, None] if len(set(tokens)) > 1 else nothing


def _parts(keys: _Keys, params: Mapping[str, str]) -> dict[str, str]:
    """Return a level by the names it consists of: {"optimizer": "adamw", "shape": "1x512"}."""
    shape = "x".join(params.get(key, "None") for key in keys if key in SHAPE)
    return {"shape" if key in SHAPE else key: shape if key in SHAPE else params.get(key, "None") for key in keys}


def _name(keys: _Keys) -> str:
    return " + ".join(_parts(keys, {}))


# What varied


def _varied(trials: Sequence[Trial], sweeps: Sequence[Sweep]) -> list[str]:
    """Return keys of settings that differ between trials, without those that follow from another."""
    keys = {key for trial in trials for key in trial.params}
    values = {key: [trial.params.get(key, "None") for trial in trials] for key in keys if not _no_effect(key)}
    varying = {key for key in values if len(set(values[key])) > 1}
    groups = {key.split(".")[0] for key in keys if "." in key} & keys
    kept = varying - groups
    for group in groups:
        leaves = {key for key in keys if key.startswith(f"{group}.") and len({t.params.get(key) for t in trials}) > 1}
        if group in varying and not (leaves and all(_no_effect(leaf) for leaf in leaves)):
            kept.add(group)
        own = {leaf for leaf in leaves & varying if group not in kept or not _determines(values[group], values[leaf])}
        kept = kept - leaves | _one_of_each(own, values)
    asked = [key for sweep in sweeps for key in sweep.axes]

    def place(key: str) -> tuple[int, int, str]:
        group = key.split(".")[0]
        first = asked.index(key) if key in asked else len(asked)
        return first, _ORDER.index(group) if group in _ORDER else len(_ORDER), key

    return sorted(kept, key=place)


def _no_effect(key: str) -> bool:
    return key in NO_EFFECT or key.split(".")[0] in NO_EFFECT


def _determines(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether each value of one goes with a single value of the other."""
    return len(set(zip(one, other, strict=True))) == len(set(one))


def _one_of_each(keys: Iterable[str], values: Mapping[str, Sequence[str]]) -> set[str]:
    """Return of keys that always change together only the shortest."""
    kept: list[str] = []
    for key in sorted(keys, key=lambda key: (len(key), key)):
        told = values[key]
        if not any(_determines(values[other], told) and _determines(told, values[other]) for other in kept):
            kept.append(key)
    return set(kept)


def _fixed(trials: Sequence[Trial]) -> dict[str, str]:
    params = trials[0].params if trials else {}
    top = [key for key in params if not _no_effect(key) and ("." not in key or key.split(".")[0] not in params)]
    order = sorted(top, key=lambda key: (_ORDER.index(key) if key in _ORDER else len(_ORDER), key))
    return {key: params[key] for key in order if all(trial.params.get(key) == params[key] for trial in trials)}


# What can be separated


def _blocks(varied: Sequence[str]) -> list[_Keys]:
    """Return each setting by itself; shape has batch_size and seq_len always, so that its levels can be read."""
    shape = tuple(key for key in SHAPE if key in varied or key != "grad_accum_steps")
    return list(dict.fromkeys(shape if key in SHAPE else (key,) for key in varied))


def _merged(blocks: Sequence[_Keys], trials: Sequence[Trial]) -> list[_Keys]:
    """Merge what `trials` cannot separate until the rest can be separated: a merged factor has more levels than its
    settings had, so others may become aliased with it."""
    raw = [{key: trial.params.get(key, "None") for keys in blocks for key in keys} for trial in trials]
    merged = _joined(blocks, tied(raw))
    while found := tied([{_name(keys): str(_parts(keys, trial.params)) for keys in merged} for trial in trials]):
        merged = _joined(merged, found)
    return merged


def _joined(blocks: Sequence[_Keys], groups: Sequence[tuple[str, ...]]) -> list[_Keys]:
    def group(keys: _Keys) -> object:
        names = {*keys, _name(keys)}
        return next((found for found in groups if names & set(found)), keys)

    made: dict[object, _Keys] = {}
    for keys in blocks:
        made[group(keys)] = made.get(group(keys), ()) + keys
    return list(made.values())


def _confounded(keys: _Keys, varied: Sequence[str], trials: Sequence[Trial], measured: Sequence[Trial]) -> Confounded:
    settings = tuple(key for key in keys if key in varied)
    shape = [key for key in settings if key in SHAPE]
    tokens = len({tokens_a_step(trial.params) for trial in trials}) > 1 if shape else False
    names = (*settings, TOKENS) if tokens else settings
    product = _product(shape, trials[0].params)
    if len(shape) == len(settings) and tokens:
        return Confounded(names=names, why=product)
    why = _why(settings, measured if len(_points(settings, measured)) > 1 else trials) + (
        f"; {product}" if tokens else ""
    )
    whole = _merged(_blocks(settings), trials)
    if len(whole) > 1:
        tried, left = _points(settings, trials), _points(settings, measured)
        why = f"with no figures at {len(tried - left)} of the {len(tried)} points tried, {why}"
    return Confounded(names=names, why=why)


def _product(shape: Sequence[str], params: Mapping[str, str]) -> str:
    """Return why tokens per step is aliased with the settings it is made of."""
    factors = [key if key in shape else params.get(key, "1") for key in SHAPE if key in shape or key in params]
    return f"{TOKENS} is " + " x ".join(factor for factor in factors if factor != "1")


def _points(settings: Sequence[str], trials: Sequence[Trial]) -> set[tuple[str, ...]]:
    return {tuple(trial.params.get(key, "None") for key in settings) for trial in trials}


def _why(settings: Sequence[str], trials: Sequence[Trial]) -> str:
    points = _points(settings, trials)
    levels = [len(set(told)) for told in zip(*points, strict=True)]
    listed = ", ".join(settings[:-1]) + f" and {settings[-1]}"
    if all(count == len(points) for count in levels):
        return f"{listed} changed together in every trial"
    if len(points) <= sum(count - 1 for count in levels):
        return f"{len(points)} points cannot separate {len(settings)} settings"
    return f"too few combinations of {listed} were measured to separate them"


def _note(factor: Factor, measured: Sequence[Trial]) -> str | None:
    if len({factor.level(trial) for trial in measured}) > 1:
        return None
    return f"{factor.name} varied only among trials without figures: its effect is not known"


# Levels and their order


def _factor(keys: _Keys, trials: Sequence[Trial], measured: Sequence[Trial], sweeps: Sequence[Sweep]) -> Factor:
    keys = _together(keys)
    order = {key: _place({trial.params.get(key, "None") for trial in trials}, key, sweeps) for key in keys}

    def place(trial: Trial) -> list[tuple[float | str, ...]]:
        shape = (tokens_a_step(trial.params), *(int(trial.params.get(key, "1")) for key in SHAPE))
        return [shape if key in SHAPE else order[key](trial.params.get(key, "None")) for key in keys]

    factor = Factor(name=_name(keys), keys=keys, levels=())
    examples = {factor.level(trial): trial for trial in trials}
    levels = sorted(examples, key=lambda level: place(examples[level]))
    have = Counter(factor.level(trial) for trial in measured)
    merged = len(_parts(keys, {})) > 1
    first = max(levels, key=lambda level: have[level] if merged else have[level] > 0)
    return replace(factor, levels=_first(levels, first))


def _together(keys: _Keys) -> _Keys:
    """Return the settings with those of the shape next to each other."""
    shape = tuple(key for key in SHAPE if key in keys)
    parts = dict.fromkeys(shape if key in SHAPE else (key,) for key in keys)
    return tuple(key for part in parts for key in part)


def _place(levels: Iterable[str], key: str, sweeps: Sequence[Sweep]) -> Callable[[str], tuple[int, float, str]]:
    """Return a level's sort key: as asked for by a sweep that names them all; else words in the order that sweeps name
    them, other words by the alphabet, numbers by size."""
    axes = [[_value(text) for text in sweep.axes[key]] for sweep in sweeps if key in sweep.axes]
    wanted = {_value(level) for level in levels}
    whole = next((axis for axis in axes if wanted <= set(axis)), None)
    asked = whole or [value for axis in axes for value in axis if isinstance(value, str)]

    def place(level: str) -> tuple[int, float, str]:
        value = _value(level)
        if value in asked:
            return 0, asked.index(value), ""
        return (1, 0.0, value) if isinstance(value, str) else (2, value, "")

    return place


def _value(text: str) -> float | str:
    """Return what a level's text means: 1e-5 and 1e-05 are the same, and so are null and None."""
    try:
        number = float(text)
    except ValueError:
        word = text.strip().casefold()
        return "none" if word == "null" else word
    return number if math.isfinite(number) else text


def _first(levels: Sequence[str], first: str) -> tuple[str, ...]:
    return (first, *(level for level in levels if level != first))


# The baseline


def _from(factor: Factor, baseline: Mapping[str, str], trials: Sequence[Trial]) -> Factor:
    """Return the factor with the baseline's level first."""
    known = _answers(factor, trials)
    wanted = {setting: level for setting, level in baseline.items() if setting in next(iter(known.values()))}
    fitting = [
        level
        for level in factor.levels
        if all(_value(known[level][setting]) == _value(text) for setting, text in wanted.items())
    ]
    if not fitting:
        asked = ", ".join(f"{setting}={text}" for setting, text in wanted.items())
        raise InvalidInput(f"baseline {asked}: no trial has this combination. There are: {_listed(factor.levels)}.")
    return replace(factor, levels=_first(factor.levels, fitting[0])) if wanted else factor


def _answers(factor: Factor, trials: Sequence[Trial]) -> dict[str, dict[str, str]]:
    """Return for each level what a baseline may name of it: the factor, each of its settings, the shape."""
    examples = {factor.level(trial): trial.params for trial in trials}
    found = {}
    for level in factor.levels:
        own = {key: examples[level].get(key, "None") for key in factor.keys}
        found[level] = own | _parts(factor.keys, examples[level]) | {factor.name: level}
    return found


def _check_known(setting: str, level: str, factors: Sequence[Factor], trials: Sequence[Trial]) -> None:
    asked = f"baseline {setting}={level}"
    known = [answers for factor in factors for answers in _answers(factor, trials).values()] + [_fixed(trials)]
    levels = list(dict.fromkeys(answers[setting] for answers in known if setting in answers))
    if not levels:
        names = list(dict.fromkeys(name for answers in known[:-1] for name in answers))
        raise InvalidInput(f"{asked}: this setting did not vary.{_meant(setting, names)} There are: {_listed(names)}.")
    if _value(level) not in {_value(text) for text in levels}:
        raise InvalidInput(f"{asked}: no trial has it.{_meant(level, levels)} There are: {_listed(levels)}.")


def _meant(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
