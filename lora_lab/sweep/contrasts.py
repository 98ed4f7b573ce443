"""Turn contrast=KEY,... into pairs of a grid's points, and into the rule of the sweep."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from lora_lab.comparison.rule import Contrast, Rule, percent
from lora_lab.composition.keys import known_keys, unknown_key
from lora_lab.config import AUTO, InvalidInput, TrialConfig
from lora_lab.settings import Effect, settings_of
from lora_lab.store.mlflow_names import LONGEST_TAG
from lora_lab.store.naming import word
from lora_lab.sweep.plan import GridPoint, settings_of_points, without_twins

_RULE_SETTINGS = ("contrast", "margin", "budget_minutes", "first_pairs")


def rule_of(points: Sequence[GridPoint]) -> Rule:
    """Return the rule of a sweep with repeats=auto over these points.

    Raises: InvalidInput for contrasts that the points do not hold."""
    config = points[0].config
    keys = _keys(config)
    if len(set(keys)) < len(keys):
        raise InvalidInput(f"contrast={config.contrast} names a setting twice. Name each once.")
    devices = {point.conditions.get("device.uuid", point.conditions.get("device", "")) for point in points}
    if len(devices) > 1:
        raise InvalidInput("repeats=auto compares on one device, and these points have several. Give one device=...")
    rule = Rule(
        contrasts=tuple(_contrast(key, points) for key in keys),
        margin_percent=percent(config.margin),
        budget_minutes=config.budget_minutes,
        first_pairs=config.first_pairs,
    )
    if len(rule_text(rule)) > LONGEST_TAG:
        raise InvalidInput(f"{len(points)} points are too many for one repeats=auto. Sweep fewer values.")
    return rule


def check_typed(points: Sequence[GridPoint]) -> None:
    """Raise InvalidInput for points of a sweep with repeats=auto, as typed, that have several rules, or the same value
    of a contrast twice. Such points are twins, of which later only one stays."""
    if all(point.config.repeats != AUTO for point in points):
        return
    for name in _RULE_SETTINGS:
        values = list(dict.fromkeys(str(getattr(point.config, name)) for point in points))
        if len(values) > 1:
            raise InvalidInput(
                f"{name}={','.join(values)} cannot be swept with repeats=auto, because a sweep has one rule. "
                f"Give {name} one value."
            )
    once = without_twins(points)
    for key in _keys(points[0].config):
        values, left = ([_typed(point, key) for point in each] for each in (points, once))
        if len(left) < len(values) and len(set(left)) == 1 and left[0]:
            raise InvalidInput(
                f"contrast={key} needs two values of {key} that differ, and those of this sweep are the same: "
                f"{', '.join(dict.fromkeys(values))}."
            )


def rule_text(rule: Rule) -> str:
    """Return the rule as the sweep's record has it."""
    return json.dumps(asdict(rule))


def check_same(then: Rule | None, now: Rule) -> None:
    """Raise InvalidInput when a sweep would be continued by another rule than it began with, apart from the budget:
    that rule would be chosen with figures at hand."""
    if then is None or replace(then, budget_minutes=now.budget_minutes) == now:
        return
    contrasts = ",".join(each.key for each in then.contrasts)
    order = "; ".join(f"{each.over}, {each.of}" for each in then.contrasts)
    raise InvalidInput(
        "resume=true continues the newest sweep of these points by the rule it began with, and this command has "
        f"another. Type contrast={contrasts} margin={then.margin_percent:g}% first_pairs={then.first_pairs} with the "
        f"values of then in their order ({order}: the first is the baseline). To continue an older sweep, add "
        "hydra.sweep.dir=FOLDER. To begin a new one, leave resume=true out."
    )


def _keys(config: TrialConfig) -> list[str]:
    return [key.strip().lstrip("+~") for key in str(config.contrast).split(",")]


def _typed(point: GridPoint, key: str) -> str:
    """Return the value that was typed for a key; empty if none was."""
    return next((value for k, _, value in (o.partition("=") for o in point.overrides) if k.lstrip("+~") == key), "")


def _contrast(key: str, points: Sequence[GridPoint]) -> Contrast:
    """Pair the points that differ in `key` only.

    Raises: InvalidInput."""
    settings = [{k.lstrip("+~"): value for k, value in each.items()} for each in settings_of_points(points)]
    swept = list(dict.fromkeys(k for each in settings for k in each))
    _check_swept(key, swept if len(points) > 1 else [])
    levels = list(dict.fromkeys(each[key] for each in settings))
    if len(levels) > 2:
        raise InvalidInput(
            f"contrast={key} compares two values, and {key} has {len(levels)}: {', '.join(levels)}. "
            f"Sweep two, for example {key}={levels[0]},{levels[1]}."
        )
    sides: dict[str, dict[tuple[str, ...], str]] = {level: {} for level in levels}
    for each, point in zip(settings, points, strict=True):
        sides[each[key]][tuple(each[k] for k in swept if k != key)] = point.digest
    over, of = (sides[level] for level in levels)
    if over.keys() != of.keys():
        raise InvalidInput(
            f"contrast={key} needs each point with {key}={levels[0]} and with {key}={levels[1]}; some have one only. "
            "Sweep a grid."
        )
    return Contrast(
        key=key,
        over=word(key, levels[0]),
        of=word(key, levels[1]),
        over_points=tuple(over.values()),
        of_points=tuple(of[rest] for rest in over),
    )


def _check_swept(key: str, swept: Sequence[str]) -> None:
    """Raise InvalidInput for a key that has one value only, or that no figure depends on."""
    if any(each.key == key and each.effect is not Effect.result for each in settings_of(TrialConfig)):
        raise InvalidInput(
            f"contrast={key} says where or how trials run, not what they measure. Compare another setting."
        )
    if key not in swept and key not in known_keys():
        raise InvalidInput(f"contrast={key}: {unknown_key(key)}")
    if key not in swept:
        others = f" This sweep varies {', '.join(swept)}." if swept else ""
        raise InvalidInput(f"contrast={key} needs two values of {key}. Type {key}=A,B.{others}")
