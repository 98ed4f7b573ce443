"""Find the largest batch or row length that a card takes: batch_size=max or seq_len=max, in a sweep.

lora_lab.fit says which value fits for certain and which is the largest that may fit. Trials decide between the two.
Each is an ordinary trial of the sweep, with its number as batch_size or seq_len."""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from lora_lab.composition.limits import number_faults
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.dataset.split import check_row_count
from lora_lab.fit import search as fit_search
from lora_lab.fit.beforehand import beforehand, capacity
from lora_lab.fit.shapes import shapes_of
from lora_lab.options import Batching
from lora_lab.outcome import Outcome
from lora_lab.store.sweep_folder import Attempt, Plan, Planned, SweepFolder
from lora_lab.sweep.plan import GridPoint, plan_block
from lora_lab.trial.devices import choose_placement

_FURTHER = {"batch_size": None, "seq_len": 4}
"""The most trials after the first. Row lengths differ by little, so a few trials say enough."""

Compose = Callable[[list[str]], GridPoint]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where to look, in multiples of `unit`."""

    unit: int
    certain: int
    """The largest value that fits for certain; 0 where none does."""
    possible: int
    """The largest value to try."""
    further: int | None = None
    """The most trials after the first; None for as many as it takes."""

    def following(self, tried: Mapping[int, bool]) -> int | None:
        """Return the value to try next; None when none is left.

        Args:
            tried: of each value, whether it finished. The others ran out of memory.
        """
        if not tried:
            return self.certain or self.unit
        low = max((value for value, finished in tried.items() if finished), default=0)
        high = min((value for value, finished in tried.items() if not finished), default=self.possible + self.unit)
        if high - low <= self.unit or (self.further is not None and len(tried) > self.further):
            return None
        return (low + high) // 2 // self.unit * self.unit

    @property
    def most_further(self) -> int:
        """Return how many trials follow the first at most, if that finishes."""
        needed = ((self.possible - (self.certain or self.unit)) // self.unit).bit_length()
        return needed if self.further is None else min(needed, self.further)


@dataclass(slots=True)
class Search:
    """One point of which batch_size or seq_len is looked for."""

    setting: str
    overrides: list[str]
    """As typed, with max."""
    bounds: Bounds
    beyond: str
    """Why nothing above the bounds is tried."""
    name: str = ""
    """What was typed for it and not for every other search."""
    tried: dict[int, bool] = field(default_factory=dict)
    """Of each value, whether it finished; the others ran out of memory."""
    stopped: str = ""
    """Why the search ended early; empty if it did not."""
    asked_place: int = 0
    """The position of its first trial in the order asked for."""

    @property
    def next_value(self) -> int | None:
        """Return the value to try next; None when the search is over."""
        return None if self.stopped else self.bounds.following(self.tried)

    def at(self, value: int) -> list[str]:
        """Return the overrides of the point with this value."""
        return _with(self.overrides, self.setting, value)

    def note(self, value: int, attempt: Attempt | None) -> None:
        """Take over how the trial with this value ended; None when it did not run."""
        if attempt is None:
            self.stopped = f"{self.setting}={value} did not run"
        elif attempt.outcome in (Outcome.finished.value, Outcome.out_of_memory.value):
            self.tried[value] = attempt.outcome == Outcome.finished.value
        else:
            self.stopped = f"{self.setting}={value} ended as {attempt.outcome}"

    @property
    def plan_line(self) -> str:
        """Return in words what the estimate says, and how many trials may follow the first."""
        bounds, first = self.bounds, self.bounds.following({})
        sure = f"{bounds.certain} fits for certain" if bounds.certain else "nothing fits for certain"
        return (
            f"{self.name}: by the estimate {sure}, and {bounds.possible} is the most to try. At most "
            f"{1 + bounds.most_further} trials, if the first ({first}) finishes"
        )

    @property
    def answer_line(self) -> str:
        """Return in words what the trials have shown."""
        finished = [value for value, ended_well in self.tried.items() if ended_well]
        failed = [value for value, ended_well in self.tried.items() if not ended_well]
        early = self.stopped or ("the sweep ended before" if self.next_value is not None else "")
        why = early or f"{len(self.tried)} trials are the most"
        if finished:
            largest = f"{self.setting}={max(finished)}"
        else:
            largest = "none" if self.bounds.unit in failed else f"not known ({why})"
        if failed:
            least = str(min(failed))
        else:
            least = f"not known ({self.beyond if self.bounds.possible in finished else why})"
        wrong = self.bounds.certain in failed
        return (
            f"{self.name}: largest that finished: {largest}; least that ran out of memory: {least}"
            + (f"; the estimate was wrong: it had said that {self.bounds.certain} fits for certain" if wrong else "")
            + (f"; not all was tried: {early}" if early and finished and failed else "")
        )


def searches_of(found: Sequence[list[str]], compose: Compose) -> list[Search]:
    """Return a search for each point of which batch_size or seq_len is max.

    Args:
        found: the overrides of each point.

    Raises: InvalidInput for points in which nothing can be looked for."""
    searches = []
    for overrides in found:
        asked = [key for key in _FURTHER if _place(overrides, key) is not None]
        if len(asked) > 1:
            raise InvalidInput(
                "batch_size=max and seq_len=max cannot be in one point: each depends on the other. Give one a number, "
                "or several: batch_size=max seq_len=512,1024."
            )
        for setting in asked:
            # with the least value: what is wrong then does not come from the value
            config = compose(_with(overrides, setting, fit_search.UNITS[setting])).config
            bounds, beyond = _bounds(setting, config)
            searches.append(Search(setting, overrides, bounds, beyond))
    _name(searches)
    return searches


def _name(searches: Sequence[Search]) -> None:
    shared = set.intersection(*(set(search.overrides) for search in searches)) if searches else set()
    for search in searches:
        own = [each for each in search.overrides if each not in shared and each != f"{search.setting}=max"]
        search.name = " ".join([*own, f"{search.setting}=max"])


def with_first_values(found: Sequence[list[str]], searches: Sequence[Search]) -> list[list[str]]:
    """Return the overrides of each point, with the first value of its search for max."""
    first = {tuple(search.overrides): search.at(search.bounds.following({}) or 0) for search in searches}
    return [first.get(tuple(overrides), overrides) for overrides in found]


def marked(points: Iterable[GridPoint], searches: Sequence[Search]) -> list[GridPoint]:
    """Return the points, and in those with a search its setting."""
    settings = {tuple(search.at(search.bounds.following({}) or 0)): search.setting for search in searches}
    return [replace(point, searched=settings.get(tuple(point.overrides), "")) for point in points]


def run_searches(
    folder: SweepFolder,
    searches: Sequence[Search],
    points: Sequence[GridPoint],
    compose: Compose,
    launch: Callable[[list[Planned]], int],
) -> int:
    """Run trials until every search is over, one of each search in turn. Return the exit code of the last launch.

    Args:
        points: those that the sweep began with; the first trial of each search has run.
        launch: runs trials and returns an exit code; anything but 0 ends the searches."""
    code = 0
    while code == 0:
        asked = [(search, value) for search in searches if (value := search.next_value) is not None]
        if not asked:
            break
        plan = folder.read()
        trials = [_planned(plan, points, search, compose(search.at(value))) for search, value in asked]
        folder.write(plan)
        pending = {trial.number: trial for trial in trials if folder.attempt(trial) is None}
        code = launch(list(pending.values())) if pending else 0
        for (search, value), trial in zip(asked, trials, strict=True):
            search.note(value, folder.attempt(trial))
    return code


def note_answers(folder: SweepFolder, searches: Sequence[Search]) -> None:
    """Put the answers into the sweep's record."""
    plan = folder.read()
    plan.record.tags["largest"] = "\n".join(search.answer_line for search in searches)
    folder.write(plan)


def _planned(plan: Plan, points: Sequence[GridPoint], search: Search, point: GridPoint) -> Planned:
    """Return the plan's trial of a point; a new one is added to the plan."""
    known = next((trial for trial in plan.trials if trial.point == point.digest), None)
    if known is None:
        point = replace(point, searched=search.setting)
        block = plan_block([*points, point], 0, points[0].config.seed, 0)
        fresh = next(trial for trial in block if trial.point == point.digest)
        known = replace(fresh, number=len(plan.trials), asked_place=search.asked_place)
        plan.trials.append(known)
        plan.conditions[point.digest] = point.conditions
    elif not search.tried:
        search.asked_place = known.asked_place
    return known


def _bounds(setting: str, config: TrialConfig) -> tuple[Bounds, str]:
    """Return where to look for the largest value, and why not above that.

    Args:
        config: the point with the least value.

    Raises: InvalidInput where there is nothing to look for, or nobody knows where."""
    typed = f"{setting}=max"
    values = f"{setting}=1,2,4,8" if setting == "batch_size" else f"{setting}=512,1024,2048"
    if config.repeats != 1:
        raise InvalidInput(
            f"{typed} runs each value once, and this sweep has repeats={config.repeats}. Leave repeats out, and repeat "
            "the value that is found in a sweep of its own."
        )
    if config.resume:
        raise InvalidInput(f"{typed} cannot be resumed. Leave resume=true out: the search begins again.")
    if config.train.is_job:
        raise InvalidInput(
            f"{typed} would run a whole training for each value. Leave train.epochs and train.max_steps out, and train "
            "with the value that is found."
        )
    cards = choose_placement(config.device).cards
    if not cards:
        raise InvalidInput(
            f"{typed} looks for the limit of an NVIDIA card, and this trial runs on the CPU. Name values: {values}."
        )
    known = beforehand(config)
    if known.estimate is None:
        raise InvalidInput(f"{typed} begins at an estimate, and there is none: {known.reason} Name values: {values}.")
    there = capacity(config, min(card.total_bytes for card in cards))
    shapes = shapes_of(config.model)
    unit = fit_search.UNITS[setting]
    looks = fit_search.Search(config, shapes)
    certain, possible = (looks.largest(setting, there, certain) // unit * unit for certain in (True, False))
    valid, why = _most_valid(setting, config, unit, possible)
    if valid == possible and setting == "seq_len" and shapes.longest and possible + unit > shapes.longest:
        why = "the model takes no longer rows"
    possible = max(unit, min(max(certain, possible), valid))
    beyond = why or f"{possible + unit} certainly does not fit, by the estimate for full rows"
    return Bounds(unit, min(certain, valid), possible, _FURTHER[setting]), beyond


def _most_valid(setting: str, config: TrialConfig, unit: int, possible: int) -> tuple[int, str]:
    """Return the largest value up to `possible` that a trial may have, and why no larger one; empty for `possible`."""

    def why_not(value: int) -> str:
        by_rows = setting == "batch_size"
        if number_faults(replace(config, batch_size=value) if by_rows else replace(config, seq_len=value)):
            return "no trial may have more tokens in memory"
        counted = config.data.rows is not None and config.data.batching is not Batching.packed
        if by_rows and counted and config.data.heldout_path is None:
            with suppress(InvalidInput):
                needed = replace(config, batch_size=value).rows_per_step
                check_row_count(config.data.rows or 0, config.data.holdout, needed)
                return ""
            return "the data has no more rows for a step"
        return ""

    values = range(unit, possible + 1, unit)
    valid = unit * bisect.bisect_left(values, True, key=lambda value: bool(why_not(value)))
    return valid, why_not(valid + unit) if valid < possible else ""


def _with(overrides: Sequence[str], setting: str, value: int) -> list[str]:
    """Return overrides with a value for the max of a setting."""
    place = _place(overrides, setting)
    return [f"{each.partition('=')[0]}={value}" if at == place else each for at, each in enumerate(overrides)]


def _place(overrides: Sequence[str], setting: str) -> int | None:
    """Return where overrides ask for the max of a setting; None when they do not."""
    for place, override in enumerate(overrides):
        key, _, value = override.partition("=")
        if key.lstrip("+") == setting and value.strip("'\"") == "max":
            return place
    return None
