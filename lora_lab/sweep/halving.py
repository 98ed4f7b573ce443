"""Run a sweep by successive halving: `hydra.sweeper.halving` in the sweep's file.

Each contender (a point without the searched setting) tries its values in short trials. The better half of them runs
again from the start and longer, and the best one at last with all repeats. Every trial is an ordinary one, with tags
that say its rung and why its value stopped there."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_lab.comparison.halving import (
    CONTENDER,
    LOSS,
    NOT_STOPPED,
    RUNG,
    STOPPED,
    VALUE,
    Tried,
    at_the_edge,
    choose,
    kept,
)
from lora_lab.composition.keys import known_keys, unknown_key
from lora_lab.config import InvalidInput
from lora_lab.outcome import Outcome
from lora_lab.store.naming import point_name
from lora_lab.store.outbox import Outbox
from lora_lab.store.sweep_folder import Attempt, Plan, Planned, SweepFolder
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.sweep.largest import Search
from lora_lab.sweep.plan import GridPoint, plan_block, settings_of_points

_HERE = "hydra.sweeper.halving"

Compose = Callable[[list[str]], GridPoint]


@dataclass
class HalvingConf:
    """The keys below hydra.sweeper.halving."""

    best_of: str = "learning_rate"
    """The setting whose best value is looked for, by itself for each combination of all others."""
    length: str = "train.max_steps"
    """The setting that says how long a trial is."""
    rungs: list[int] = field(default_factory=list)
    """Its values, one a rung; none for a sweep without halving."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One value of one contender."""

    contender: str
    value: str
    """With its key: learning_rate=0.0002."""
    point: GridPoint
    """As the first rung runs it."""
    place: int
    """Its position in the order asked for."""


class Halving:
    """The rungs of one sweep."""

    def __init__(self, asked: Any, found: Sequence[list[str]]) -> None:
        """Take what the sweep's file says (a HalvingConf, as Hydra hands it on), and the overrides of each point.

        Raises: InvalidInput."""
        self.best_of, self.length, self.rungs = asked.best_of, asked.length, list(asked.rungs)
        self.candidates: list[Candidate] = []
        self.best: dict[str, str] = {}
        """The value of each contender that came into the last rung, once that is known."""
        for key in (self.best_of, self.length):
            if key not in known_keys():
                raise InvalidInput(f"{_HERE}: {unknown_key(key)}")
        if len(self.rungs) < 2 or sorted({max(1, rung) for rung in self.rungs}) != self.rungs:
            raise InvalidInput(
                f"{_HERE}.rungs={self.rungs} is not two or more lengths, each longer than the one before. "
                f"Give them, for example, as {_HERE}.rungs=[50,100,200]."
            )
        for key in (each.partition("=")[0].lstrip("+~") for overrides in found for each in overrides):
            if key == self.length:
                raise InvalidInput(f"{key} is what the rungs set. Give {_HERE}.rungs=[...] instead.")

    @property
    def last(self) -> int:
        """Return the number of the last rung, from 0."""
        return len(self.rungs) - 1

    def at(self, overrides: Sequence[str], rung: int) -> list[str]:
        """Return the overrides of a point, with the length of a rung."""
        own = [each for each in overrides if each.partition("=")[0].lstrip("+~") != self.length]
        return [*own, f"{self.length}={self.rungs[rung]}"]

    def take(self, points: Sequence[GridPoint], searches: Sequence[Search], compose: Compose) -> None:
        """Take the points of the first rung as candidates.

        Raises: InvalidInput where nothing can be searched."""
        if searches:
            raise InvalidInput(f"{_HERE} and {searches[0].setting}=max do not go together. Give numbers.")
        names = contenders(points, {self.best_of, self.length})
        values = [_value(point, self.best_of) for point in points]
        if max(Counter(names).values()) < 2:
            raise InvalidInput(
                f"{_HERE} looks for the best {self.best_of}, and no point has two values of it. Give several, for "
                f"example {self.best_of}=1e-4,3e-4, or leave halving out."
            )
        config = points[0].config
        if config.cotrain:
            raise InvalidInput(
                f"{_HERE} ends some trials sooner than others, and cotrain={','.join(config.cotrain)} trains them "
                "together. Leave one of them out."
            )
        if not isinstance(config.repeats, int):
            raise InvalidInput(f"{_HERE} repeats its last rung a fixed number of times. Give repeats=3, not auto.")
        if any(point.config.measure.eval_rows == 0 for point in points):
            raise InvalidInput(f"{_HERE} chooses by the held-out loss, and measure.eval_rows=0 evaluates no rows.")
        if not self.candidates:  # a wrong length is refused before the first trial
            for rung in range(1, len(self.rungs)):
                compose(self.at(points[0].overrides, rung))
        self.candidates = [
            Candidate(name, value, point, place)
            for place, (name, value, point) in enumerate(zip(names, values, points, strict=True))
        ]

    def plan(self, candidates: Sequence[Candidate], rung: int, compose: Compose | None = None) -> list[Planned]:
        """Plan the trials of a rung, in blocks. The last rung has all repeats, the others one.

        Args:
            compose: makes the points of a rung after the first."""
        points = [self._point(each, rung, compose) for each in candidates]
        first = self.candidates[0].point.config
        assert isinstance(first.repeats, int)
        of = {point.digest: each for point, each in zip(points, candidates, strict=True)}
        blocks = range(first.repeats if rung == self.last else 1)
        found = [trial for block in blocks for trial in plan_block(points, block, first.seed, block * len(points))]
        return [self._named(trial, of[trial.point], rung) for trial in found] if points else []

    def trying(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that have a rival of their own contender: a rung before the last decides nothing for
        the others, which skip it."""
        rivals = Counter(each.contender for each in candidates)
        return [each for each in candidates if rivals[each.contender] > 1]

    def _point(self, candidate: Candidate, rung: int, compose: Compose | None) -> GridPoint:
        if rung == 0 or compose is None:
            return candidate.point
        # the length is no part of the conditions
        return replace(compose(self.at(candidate.point.overrides, rung)), conditions=candidate.point.conditions)

    def _named(self, trial: Planned, candidate: Candidate, rung: int) -> Planned:
        value, steps = candidate.value, self.rungs[rung]
        length = self.length.rpartition(".")[2]
        return replace(
            trial,
            asked_place=rung * len(self.candidates) + candidate.place,
            settings={"contender": candidate.contender, self.best_of: value.partition("=")[2], length: str(steps)},
            point_name=f"{candidate.contender} {value} {length}={steps}",
            tags={CONTENDER: candidate.contender, VALUE: value, RUNG: f"{rung + 1} of {len(self.rungs)}"},
        )

    @property
    def plan_line(self) -> str:
        """Return in words what runs, and how much at most."""
        rivals = Counter(each.contender for each in self.candidates)
        repeats = int(self.candidates[0].point.config.repeats)
        trials = length = 0
        going = dict(rivals)
        for rung, steps in enumerate(self.rungs):
            is_last = rung == self.last
            ran = sum(going.values()) * repeats if is_last else sum(n for n in going.values() if n > 1)
            trials, length = trials + ran, length + ran * steps
            going = {name: kept(n, rung + 1 == self.last) for name, n in going.items()}
        times = "once" if repeats == 1 else f"{repeats} times"
        return (
            f"halving: {len(rivals)} contenders look for their best {self.best_of} in rungs of {self.length}="
            f"{','.join(map(str, self.rungs))}. The above is the first rung. There are at most {trials} trials in all, "
            f"with {length:,} of {self.length} together; the last rung runs the best of each {times}"
        )


def contenders(points: Sequence[GridPoint], without: set[str]) -> list[str]:
    """Return the name of each point's contender: the settings in which contenders differ, as the point was given
    them."""
    names = []
    for settings in settings_of_points(points):
        own = {key.lstrip("+~"): text for key, text in settings.items()}
        names.append(point_name({k: v for k, v in own.items() if k not in without and v != "default"}))
    return [name or "the only contender" for name in names]


def run_rungs(
    folder: SweepFolder,
    halving: Halving,
    compose: Compose,
    launch: Callable[[list[Planned]], int],
    store: Outbox,
) -> int:
    """Run the rungs after the first, which has run. Return the exit code of the last launch.

    Which values go on is decided again from all trials at each start, so that a resume comes to the same rungs.

    Args:
        launch: runs trials and returns an exit code; anything but 0 ends the sweep."""
    going = halving.candidates
    for rung in range(len(halving.rungs)):
        is_last = rung == halving.last
        candidates = going if is_last else halving.trying(going)
        plan = folder.read()
        trials = _taken(plan, halving.plan(candidates, rung, compose), candidates)
        if rung > 0:
            folder.write(plan)
            over = zip(trials, folder.attempts(trials), strict=True)
            pending = [trial for trial, attempt in over if attempt is None or not attempt.done]
            if pending:
                print(f"rung {rung + 1} of {len(halving.rungs)}: {halving.length}={halving.rungs[rung]}")
            code = launch(pending) if pending else 0
            if code != 0:
                return code
        if not is_last:
            stopped = _judge(folder, trials, halving, rung, store)
            going = [each for each in going if stopped.get((each.contender, each.value), NOT_STOPPED) == NOT_STOPPED]
        halving.best = {each.contender: each.value for each in going} if rung + 1 >= halving.last else {}
    return 0


def note_best(folder: SweepFolder, halving: Halving) -> list[str]:
    """Put what each contender's best value is into the sweep's record. Return it in lines."""
    plan = folder.read()
    lines = []
    for contender in dict.fromkeys(each.contender for each in halving.candidates):
        values = [each.value for each in halving.candidates if each.contender == contender]
        best = halving.best.get(contender)
        if best is None:
            lines.append(f"{contender}: no {halving.best_of} came into the last rung")
            continue
        edge = at_the_edge(best, values)
        wider = f", the {edge} that was tried: a better one may lie beyond" if edge else ""
        lines.append(f"{contender}: {best} of {', '.join(each.partition('=')[2] for each in values)}{wider}")
    plan.record.tags["halving"] = "\n".join(lines)
    folder.write(plan)
    return lines


def _taken(plan: Plan, trials: Sequence[Planned], candidates: Sequence[Candidate]) -> list[Planned]:
    """Return the plan's own trials; those that it lacks are added to it."""
    there = {trial.fingerprint: trial for trial in plan.trials}
    conditions = {(each.contender, each.value): each.point.conditions for each in candidates}
    found = []
    for trial in trials:
        known = there.get(trial.fingerprint)
        if known is None:
            known = replace(trial, number=len(plan.trials))
            plan.trials.append(known)
            plan.conditions[trial.point] = conditions[trial.tags[CONTENDER], trial.tags[VALUE]]
        found.append(replace(trial, number=known.number))
    return found


def _judge(
    folder: SweepFolder, trials: Sequence[Planned], halving: Halving, rung: int, store: Outbox
) -> dict[tuple[str, str], str]:
    """Decide which values go on after a rung, and tag its trials with that.

    Returns: why each value stops, by contender and value; NOT_STOPPED for those that go on."""
    attempts = dict(zip((trial.number for trial in trials), folder.attempts(trials), strict=True))
    found: dict[tuple[str, str], str] = {}
    for contender in dict.fromkeys(trial.tags[CONTENDER] for trial in trials):
        own = sorted((t for t in trials if t.tags[CONTENDER] == contender), key=lambda trial: trial.asked_place)
        tried = [_tried(trial, attempts[trial.number]) for trial in own]
        said = choose(tried, kept(len(tried), rung + 1 == halving.last))
        for trial in own:
            why = found[contender, trial.tags[VALUE]] = said[trial.tags[VALUE]]
            name = folder.latest_attempt(trial)
            if name is not None:
                store.add_tags(TrialFolder(folder.path / name), {STOPPED: why})
    return found


def _tried(trial: Planned, attempt: Attempt | None) -> Tried:
    value = trial.tags[VALUE]
    if attempt is None:
        return Tried(value, None, "it did not run")
    if attempt.outcome != Outcome.finished.value:
        reason = f": {attempt.reason}" if attempt.reason else ""
        return Tried(value, None, f"it ended as {attempt.outcome}{reason}")
    return Tried(value, attempt.metrics.get(LOSS), attempt.tags.get(f"absent.{LOSS}", ""))


def _value(point: GridPoint, key: str) -> str:
    """Return a point's value with its key, as it was typed; the default where it was not."""
    for override in reversed(point.overrides):
        name, _, value = override.partition("=")
        if name.lstrip("+~") == key:
            return f"{key}={value}"
    return f"{key}=default"
