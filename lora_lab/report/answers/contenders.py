"""Compare the contenders of a sweep by halving, each at its best value: after equal steps, and for equal cost.

Losses are means over the repeats of the last rung, with Student's interval over these. What each contender is over the
lowest is paired by repeat, since repeats share their seed. For equal cost the loss is read off each job's own curve of
held-out losses, where the job had used as much as the cheapest contender used in all. A job's cost is taken as even
over its steps."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import sqrt
from statistics import fmean, median

from lora_lab.comparison.halving import CONTENDER, NOT_STOPPED, RUNG, STOPPED, VALUE, at_the_edge
from lora_lab.options import Schedule
from lora_lab.report.measures import ENERGY, HOURS, KWH, LOSS, THROUGHPUT, VRAM, Measure
from lora_lab.report.statistics.estimates import Estimate, estimate, variance
from lora_lab.report.statistics.kinds import Kind, groups_alike, kind_of
from lora_lab.store.trials import Trial

CURVE = "heldout/loss"
"""The series of a job's held-out losses between its steps."""

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, int, float]]]]
"""Series by run id and key: Unix time in ms, step, value."""

COSTS = {Kind.job: (HOURS, KWH, VRAM), Kind.window: (THROUGHPUT, ENERGY, VRAM)}
"""What is shown of each kind besides the loss."""

SPENT = (HOURS, KWH)
"""Costs that grow with the steps, at equal amounts of which losses are compared."""

_EVEN = 1.01
"""Up to this ratio the tokens of two contenders count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A value that did not come into the last rung."""

    value: str
    rung: str
    """After which it stopped: 1 of 3."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One contender at its best value."""

    name: str
    value: str
    """Its best value with the key: learning_rate=0.0002; "" where none came into the last rung."""
    edge: str
    """"lowest" or "highest" where that is an end of the values tried, else ""."""
    repeats: int
    """Finished trials of the last rung."""
    loss: Estimate | None
    over_lowest: Estimate | None
    """Its loss minus that of the lowest; None for that one, and where no repeat has both."""
    costs: Mapping[str, float]
    """Medians by the measure's name."""
    for_equal: Mapping[str, Estimate]
    """Its loss by the name of a cost, where it had used as much of it as the cheapest contender in all."""
    stopped: tuple[Stopped, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contenders:
    """All contenders of a sweep at one place, the lowest loss first."""

    kind: Kind
    best_of: str
    """The setting that was searched."""
    contenders: tuple[Contender, ...]
    why_no_loss: str
    """Why no contender has a loss; "" where one has."""
    why_not_equal: Mapping[str, str]
    """By the name of a cost, why losses are not compared at equal amounts of it."""
    uneven_tokens: tuple[float, float] | None
    """The least and the most tokens of a contender, where they are not the same."""

    @property
    def is_over(self) -> bool:
        """Return whether some contender has a trial of the last rung that can be compared."""
        return any(each.value for each in self.contenders)

    @property
    def shown(self) -> tuple[Measure, ...]:
        """Return the costs that some contender has."""
        return tuple(m for m in COSTS[self.kind] if any(m.name in each.costs for each in self.contenders))

    @property
    def equal(self) -> tuple[Measure, ...]:
        """Return the costs for which losses are compared at equal amounts."""
        return tuple(m for m in SPENT if any(m.name in each.for_equal for each in self.contenders))


def compared_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that a report compares: of a sweep by halving those of its last rung, once one has ended. Those
    of earlier rungs are shorter, and at values that may have lost."""
    with_last = {trial.sweep for trial in trials if _in_last_rung(trial)}
    return [trial for trial in trials if _in_last_rung(trial) or RUNG not in trial.tags or trial.sweep not in with_last]


def contenders(trials: Sequence[Trial], curves: Curves) -> list[Contenders]:
    """Return the contenders of each sweep by halving, and of each place."""
    made = []
    for group in groups_alike([trial for trial in trials if CONTENDER in trial.tags]):
        usable = {trial.run_id for trial in group.measured}
        there = [*group.trials, *(each.trial for each in group.excluded if each.trial not in group.trials)]
        for _, members in groupby(sorted(there, key=lambda one: str(one.sweep)), key=lambda one: one.sweep):
            made.append(_of_sweep(list(members), usable, curves))
    return made


def _of_sweep(trials: Sequence[Trial], usable: set[str], curves: Curves) -> Contenders:
    names = dict.fromkeys(trial.tags[CONTENDER] for trial in sorted(trials, key=lambda one: one.started_ms))
    own = {name: [trial for trial in trials if trial.tags[CONTENDER] == name] for name in names}
    last = {name: _newest_value([t for t in own[name] if _in_last_rung(t) and t.run_id in usable]) for name in names}
    kind = kind_of(trials[0])
    measured = [trial for name in names for trial in last[name]]
    losses = {name: loss for name in names if (loss := _mean(_losses(last[name]))) is not None}
    lowest = min(losses, key=lambda name: losses[name].value, default=None)
    equal, why_not = _for_equal(last, curves)
    made = [
        Contender(
            name=name,
            value=last[name][0].tags[VALUE] if last[name] else "",
            edge=at_the_edge(last[name][0].tags[VALUE], [t.tags[VALUE] for t in own[name]]) if last[name] else "",
            repeats=len(last[name]),
            loss=losses.get(name),
            over_lowest=None if lowest in (None, name) else _over(last[name], last[lowest or ""]),
            costs={m.name: value for m in COSTS[kind] if (value := _median(last[name], m)) is not None},
            for_equal={measure: found[name] for measure, found in equal.items() if name in found},
            stopped=_stopped(own[name]),
        )
        for name in names
    ]
    made.sort(key=lambda each: (each.loss is None, each.loss.value if each.loss is not None else 0.0))
    return Contenders(
        kind=kind,
        best_of=trials[0].tags[VALUE].partition("=")[0],
        contenders=tuple(made),
        why_no_loss="" if losses else _why_no_loss(measured),
        why_not_equal=why_not,
        uneven_tokens=_uneven(last),
    )


def _in_last_rung(trial: Trial) -> bool:
    rung, _, rungs = trial.tags.get(RUNG, "").partition(" of ")
    return rung != "" and rung == rungs


def _newest_value(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials of the value that was tried last: after a resume another value may have won."""
    if not trials:
        return []
    newest = max(trials, key=lambda trial: trial.started_ms).tags[VALUE]
    return [trial for trial in trials if trial.tags[VALUE] == newest]


def _stopped(trials: Sequence[Trial]) -> tuple[Stopped, ...]:
    there = [t for t in trials if t.tags.get(STOPPED, NOT_STOPPED) != NOT_STOPPED]
    there.sort(key=lambda trial: (trial.tags[RUNG], trial.started_ms))
    return tuple(Stopped(value=t.tags[VALUE], rung=t.tags[RUNG], why=t.tags[STOPPED]) for t in there)


def _losses(trials: Sequence[Trial]) -> dict[int, float]:
    """Return the held-out losses by their repeat."""
    return {trial.repeat: loss for trial in trials if (loss := LOSS.of(trial)) is not None}


def _mean(values: Mapping[int, float]) -> Estimate | None:
    """Return the mean with Student's interval over repeats; None without values."""
    if not values:
        return None
    mean, count = fmean(values.values()), len(values)
    if count == 1:
        return Estimate(value=mean, why_no_interval="nothing was repeated")
    return estimate(mean, sqrt(variance(values.values()) / count), count - 1)


def _over(one: Sequence[Trial], other: Sequence[Trial]) -> Estimate | None:
    its, lowest = _losses(one), _losses(other)
    return _mean({repeat: its[repeat] - lowest[repeat] for repeat in its.keys() & lowest.keys()})


def _median(trials: Sequence[Trial], measure: Measure) -> float | None:
    values = [value for trial in trials if (value := measure.of(trial)) is not None]
    return median(values) if values else None


def _why_no_loss(measured: Sequence[Trial]) -> str:
    return LOSS.why_absent(measured[0]) if measured else "no trial of the last rung has figures that can be compared"


def _uneven(last: Mapping[str, Sequence[Trial]]) -> tuple[float, float] | None:
    tokens = [median(found) for trials in last.values() if (found := [_tokens(trial) for trial in trials])]
    return (min(tokens), max(tokens)) if tokens and max(tokens) > _EVEN * min(tokens) else None


def _tokens(trial: Trial) -> float:
    """Return the real tokens that a job trained on; of a window the slots of its steps, which are asked for."""
    found = trial.metrics.get("job/tokens")
    if found is not None:
        return found
    asked = ("measure.steps", "batch_size", "grad_accum_steps", "seq_len")
    product = 1.0
    for key in asked:
        product *= float(trial.params.get(key, "1"))
    return product


# For equal cost


def _for_equal(
    last: Mapping[str, Sequence[Trial]], curves: Curves
) -> tuple[dict[str, dict[str, Estimate]], dict[str, str]]:
    """Return each contender's loss by the name of a cost, and by that name why there is none."""
    made, why_not = dict[str, dict[str, Estimate]](), dict[str, str]()
    there = {name: trials for name, trials in last.items() if trials}
    for measure in SPENT:
        totals = {name: _median(trials, measure) for name, trials in there.items()}
        lacking = [name for name, total in totals.items() if total is None]
        why = _why_no_curve([trial for trials in there.values() for trial in trials], curves)
        if lacking and not why:
            why = f"no {measure.title}: {measure.why_absent(there[lacking[0]][0])}"
        if why or len(there) < 2:
            why_not[measure.name] = why or "there is one contender"
            continue
        least = min(total for total in totals.values() if total is not None)
        found = {name: _mean(_at(trials, measure, least, curves)) for name, trials in there.items()}
        made[measure.name] = {name: loss for name, loss in found.items() if loss is not None}
    return made, why_not


def _why_no_curve(trials: Sequence[Trial], curves: Curves) -> str:
    """Return why losses before the end cannot be compared; "" where they can."""
    for trial in trials:
        if LOSS.of(trial) is None:
            return LOSS.why_absent(trial)
        if kind_of(trial) is not Kind.job:
            return "a window evaluates at its end only; a job (train.max_steps) evaluates between its steps"
        schedule = trial.params.get("train.schedule", "")
        if schedule != Schedule.constant.name:
            return f"with train.schedule={schedule} a loss before the end is not that of a shorter job"
        if len(_curve(trial, curves)) < 3:
            return "the held-out rows were not evaluated between the steps (train.eval_every)"
    return ""


def _curve(trial: Trial, curves: Curves) -> list[tuple[float, float]]:
    """Return steps and held-out losses, from before the first step."""
    before = trial.metrics.get("loss/eval_before")
    start = [] if before is None else [(0.0, before)]
    read = {step: loss for _, step, loss in sorted(curves.get(trial.run_id, {}).get(CURVE, ()))}
    return [*start, *((float(step), loss) for step, loss in sorted(read.items()) if step > 0)]


def _at(trials: Sequence[Trial], measure: Measure, least: float, curves: Curves) -> dict[int, float]:
    """Return each repeat's loss where it had used `least` of a cost."""
    found = {}
    for trial in trials:
        total, curve = measure.of(trial), _curve(trial, curves)
        if total is not None:
            found[trial.repeat] = between(curve, curve[-1][0] * min(1.0, least / total))
    return found


def between(curve: Sequence[tuple[float, float]], step: float) -> float:
    """Return the loss at a step, on the straight line between the evaluations around it.

    Args:
        curve: steps, ascending, and losses."""
    place = bisect_left(curve, step, key=lambda point: point[0])
    if place == 0:
        return curve[0][1]
    if place == len(curve):
        return curve[-1][1]
    (start, loss), (end, other) = curve[place - 1], curve[place]
    return loss + (other - loss) * (step - start) / (end - start)
