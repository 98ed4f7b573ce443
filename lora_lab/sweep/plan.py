"""Plan the trials of a sweep and their order, and find those that an earlier sweep has done."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.paths import MULTIRUN
from lora_lab.reading import Damaged
from lora_lab.store.fingerprint import digest
from lora_lab.store.naming import point_name
from lora_lab.store.sweep_folder import Plan, Planned, SweepFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPoint:
    """One point of a grid, as asked for."""

    overrides: list[str]
    config: TrialConfig
    digest: str
    conditions: dict[str, str]
    """What decides the result besides the config."""
    searched: str = ""
    """The setting whose largest value is looked for; empty for most points."""


def plan_trials(points: Sequence[GridPoint], repeats: int, seed: int) -> list[Planned]:
    """Plan every point `repeats` times, in blocks: all points once before any point again. The order inside each block
    is random (from `seed`), so that a machine that drifts favours no point. Repeat r of a point has its seed plus r."""
    return [trial for repeat in range(repeats) for trial in plan_block(points, repeat, seed, repeat * len(points))]


def plan_block(points: Sequence[GridPoint], repeat: int, seed: int, number: int) -> list[Planned]:
    """Plan one block of `plan_trials`, numbered from `number` on."""
    settings = settings_of_points(points)
    order = random.Random(f"{seed} {repeat}").sample(range(len(points)), len(points))
    trials = []
    for later, place in enumerate(order):
        point = points[place]
        overrides = [o for o in point.overrides if o.partition("=")[0] != "seed"]
        trials.append(
            Planned(
                number=number + later,
                settings=settings[place],
                asked_place=place,
                repeat=repeat,
                overrides=[*overrides, f"seed={point.config.seed + repeat}"],
                point=point.digest,
                fingerprint=digest([point.digest, repeat, point.conditions]),
                point_name=_name(settings[place], point.config),
            )
        )
    return trials


def without_twins(points: Sequence[GridPoint]) -> list[GridPoint]:
    """Return each point once: a grid can name the same config twice."""
    first: dict[str, GridPoint] = {}
    for point in points:
        first.setdefault(point.digest, point)
    return list(first.values())


def settings_of_points(points: Sequence[GridPoint]) -> list[dict[str, str]]:
    """Return for each point the settings in which it differs from others; for a single point all that were asked for.
    A key that only other points were given is "default" there, so that no two points have the same name. A setting
    whose largest value is looked for is among them: other values of it follow."""
    asked = [{key: value for key, _, value in (o.partition("=") for o in point.overrides)} for point in points]
    keys = dict.fromkeys(key for settings in asked for key in settings)
    filled = [{key: settings.get(key, "default") for key in keys} for settings in asked]
    searched = {point.searched for point in points} - {""}
    alone = len(points) == 1 and not searched

    def differs(key: str) -> bool:
        return alone or key.lstrip("+") in searched or len({settings[key] for settings in filled}) > 1

    differing = [key for key in keys if differs(key)]
    return [{key: settings[key] for key in differing} for settings in filled]


def _name(settings: dict[str, str], config: TrialConfig) -> str:
    """Name a point by these settings; batch size and row length always together, as the report has them."""
    shape = {"batch_size": str(config.batch_size), "seq_len": str(config.seq_len)}
    return point_name(settings | shape if shape.keys() & settings.keys() else settings)


def take_up(
    trials: Sequence[Planned], folder: Path, compares: bool = False
) -> tuple[SweepFolder, list[Planned]] | None:
    """Find the newest sweep that has some of these trials, in `folder` or below multirun/.

    Args:
        compares: whether to look among sweeps with repeats=auto, or among all others.

    Returns: the sweep, and these trials as it numbers them, with new numbers for those that it lacks; None when there
        is no such sweep."""
    wanted = {trial.fingerprint for trial in trials}
    for sweep, plan in _earlier_sweeps(folder):
        there = {trial.fingerprint: trial for trial in plan.trials}
        if not wanted & there.keys() or compares != (plan.rule is not None):
            continue
        asked = []
        for trial in trials:
            known = there.get(trial.fingerprint)
            if known is None:
                known = replace(trial, number=len(plan.trials))
                plan.trials.append(known)
            # settings that cannot change a result, such as a time limit, are as asked for now
            asked.append(replace(trial, number=known.number))
        return sweep, sorted(asked, key=lambda trial: trial.number)
    return None


def done_elsewhere(points: Sequence[GridPoint]) -> list[str]:
    """Return a line for each earlier sweep that ran some of these points under other conditions, and what differs."""
    conditions = {point.digest: point.conditions for point in points}
    said = []
    for sweep, plan in _earlier_sweeps():
        differing: set[str] = set()
        shared = [t for t in plan.trials if t.point in conditions and (sweep.attempt(t) is not None)]
        for trial in shared:
            differing |= _differences(plan.conditions.get(trial.point, {}), conditions[trial.point])
        if differing:
            what = ", ".join(sorted(differing))
            said.append(f"{len(shared)} trials in {sweep.path} ran under other conditions: {what}")
    return said


def _differences(then: dict[str, str], now: dict[str, str]) -> set[str]:
    keys = {key for key in then.keys() | now.keys() if then.get(key) != now.get(key)}
    return {f"{key} {then.get(key, 'absent')} -> {now.get(key, 'absent')}" for key in keys}


def _earlier_sweeps(*first: Path) -> Iterator[tuple[SweepFolder, Plan]]:
    """Yield `first`, then the sweeps below multirun/, newest first: the folders are named by date and time. Those there
    that cannot be read are skipped, since each start reports them.

    Raises: InvalidInput when `first`, which the user named, cannot be read."""
    there = (path.parent.absolute() for path in sorted(MULTIRUN.glob("*/*/sweep.json"), reverse=True))
    for sweep in map(SweepFolder, (*first, *there)):
        if not sweep.exists:
            continue
        try:
            plan = sweep.read()
        except Damaged as damaged:
            if sweep.path in first:
                raise InvalidInput(f"{damaged}.") from None
            continue
        yield sweep, plan
