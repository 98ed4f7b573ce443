"""Compose the points of a sweep from the command line and a preset, and report all faults at once."""

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict

from lora_lab.composition.arguments import MOST_POINTS, check_point_count
from lora_lab.composition.compose import load
from lora_lab.composition.explanations import COMPOSITION_ERRORS, explain
from lora_lab.composition.keys import chosen_options
from lora_lab.config import AUTO, InvalidInput, TrialConfig
from lora_lab.options import ClusterKind
from lora_lab.store.fingerprint import conditions, point_digest
from lora_lab.sweep.cluster.node import Node
from lora_lab.sweep.contrasts import check_typed
from lora_lab.sweep.display import progress
from lora_lab.sweep.plan import GridPoint, without_twins
from lora_lab.sweep.slots import placement_in_sweep
from lora_lab.trial.inputs import check_inputs


def combinations(
    loader: ConfigLoader, params: Mapping[str, str], lines: Sequence[str], arguments: Sequence[str]
) -> list[list[str]]:
    """Return the overrides of each point. The command line overrides the preset's points, and these override its grid.

    Raises: InvalidInput."""
    parser = OverridesParser.create(config_loader=loader)
    grid = [f"{key}={values}" for key, values in params.items()]
    found: list[list[str]] = []
    try:
        for override in parser.parse_overrides(list(arguments)):
            if override.key_or_group == "sweep" and override.is_sweep_override():
                raise InvalidInput(f"{override.input_line} names several sweeps. Run them one after the other.")
        for line in lines:
            overrides = parser.parse_overrides([*grid, *_words(line), *arguments])
            check_point_count(overrides, len(found))
            found += _product(overrides)
    except HydraException as error:
        raise InvalidInput(explain(error)) from error
    if not found:
        raise InvalidInput("hydra.sweeper.points is an empty list. Leave it out, or list points.")
    return found


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise InvalidInput(f"hydra.sweeper.points: {line} can't be split into overrides ({error}).") from error


def _product(overrides: Sequence[Override]) -> list[list[str]]:
    """Combine every value of each key with every value of the others; the last override of a key counts."""
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        several = override.is_sweep_override()
        values = override.sweep_string_iterator() if several else [override.get_value_element_as_str()]
        choices[key] = [f"{key}={value}" for value in values]
    return [list(each) for each in itertools.product(*choices.values())]


def compose_points(loader: ConfigLoader, config: DictConfig, found: Sequence[list[str]]) -> list[GridPoint]:
    """Compose and check every point.

    Args:
        config: what Hydra composed without the points' overrides.
        found: the overrides of each point.

    Raises: InvalidInput with every fault of every point."""
    points: list[GridPoint] = []
    faults: dict[str, list[str]] = {}
    for overrides in _with_progress(found, "composing the points"):
        try:
            composed = _compose(loader, config, overrides)
            check_inputs(composed)
            on_cluster = composed.cluster.kind is not ClusterKind.local
            now = {} if on_cluster else conditions_here(composed)  # a node is asked once all points are in order
        except InvalidInput as refusal:
            for fault in refusal.faults:
                faults.setdefault(fault, []).append(" ".join(overrides))
            continue
        if not points:
            repeats = composed.repeats if isinstance(composed.repeats, int) else 1  # auto: nobody knows yet
            _check_trial_count(len(found) * repeats)
        digest = point_digest(composed)
        points.append(GridPoint(overrides=overrides, config=composed, digest=digest, conditions=now))
    raise_faults(faults, len(found))
    check_typed(points)
    return without_twins(points)


def _compose(loader: ConfigLoader, config: DictConfig, overrides: list[str]) -> TrialConfig:
    try:
        composed = loader.load_sweep_config(config, overrides)
    except COMPOSITION_ERRORS as error:
        raise InvalidInput(explain(error)) from error
    chosen_options(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return load(composed)


def conditions_here(config: TrialConfig, node: Node | None = None) -> dict[str, str]:
    """Return what decides a trial's result on this machine, or on a node, besides the config. Pairs of repeats=auto
    stay on one card, so there the card itself counts."""
    placement = node.placement if node else placement_in_sweep(config)
    found = conditions(config, placement) | (node.device if node else {})
    if config.repeats == AUTO and placement.cards:
        found["device.uuid"] = placement.cards[0].uuid
    return found


def raise_faults(faults: Mapping[str, Sequence[str]], count: int) -> None:
    """Raise InvalidInput when there are faults, each with the points (of `count`) that have it."""
    if not faults:
        return
    lines = []
    for fault, where in faults.items():
        which = "every point" if len(where) == count else f"{len(where)} of {count} points, the first: {where[0]}"
        lines.append(f"{fault}\n  ({which})" if count > 1 else fault)
    raise InvalidInput(*lines)


def _check_trial_count(count: int) -> None:
    if count > MOST_POINTS:
        raise InvalidInput(
            f"the sweep would have {count:,} trials; {MOST_POINTS:,} is the most. Sweep fewer values, use "
            "fewer repeats, or run it in parts."
        )


def _with_progress(items: Sequence[list[str]], what: str) -> Iterator[list[str]]:
    with progress(what, len(items)) as seen:
        for done, item in enumerate(items, 1):
            yield item
            seen(done)
