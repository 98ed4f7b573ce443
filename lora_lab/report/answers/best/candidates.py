"""Candidates: configurations with their figures, and whether they fit."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_lab.config import InvalidInput
from lora_lab.outcome import Outcome
from lora_lab.report.answers.best.cohort import Subject
from lora_lab.report.answers.fits import LIMIT, Fit, fits
from lora_lab.report.measures import HOURS, OBJECTIVES, OF_JOBS, VRAM, Measure
from lora_lab.report.statistics.kinds import Kind
from lora_lab.report.statistics.settings import Settings, labels, settings
from lora_lab.report.writing.labels import count, outcome_text
from lora_lab.store.trials import Trial

_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The user's query."""

    objective: Measure
    vram_gib: float | None = None
    """What the card's peak may be at most, in GiB; None for no limit."""
    max_loss_increase: float | None = None
    """How far above the lowest held-out loss it may be, as a share of that: 0.01 for one percent."""
    model: str | None = None
    """Option or name of the model; None for that of the newest trial."""
    card: str | None = None
    """Part of the card's name, or the beginning of its UUID; None for that of the newest trial."""
    kind: Kind | None = None
    """None for that of the newest trial."""
    hours: float | None = None
    """What a whole job may take at most; None for no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measure of a candidate over its repeats."""

    median: float
    low: float
    """The lowest."""
    high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A configuration: equal in everything but seed, repeat and memory limit."""

    label: str
    trials: tuple[Trial, ...]
    """The trials of its figures, all under the same memory limit: the emulated capacity nearest to the budget from
    below where there is one, because torch's allocator behaves differently under a limit."""
    figures: Mapping[str, Figure]
    """By measure name; a measure that a trial lacks is taken over the others."""
    aside: int = 0
    """Measured trials under other memory limits: evidence for what fits, but not part of the figures."""
    fit: Fit | None = None
    """Whether it fits the budget, by all of its trials; None without a budget, or without evidence."""
    ran_out: bool = False
    """Whether it ran out of memory within the budget, or within more."""

    @property
    def limit_gib(self) -> float | None:
        """Return the emulated capacity of its figures; None on a whole card."""
        limit = _at_hand(self.trials[0])
        return None if math.isinf(limit) else limit

    @property
    def needs_gib(self) -> float | None:
        """Return the card's highest peak, or the emulated capacity that was enough if that is smaller.

        If it does not fit the budget: what it needs instead. None if nothing is known."""
        if self.fit is not None and self.fit.largest is None:
            return self.fit.next_needs_gib
        peak = self.fit.largest_gib if self.fit is not None else None
        peak = self.figures[VRAM.name].high if VRAM.name in self.figures else peak
        return min((value for value in (peak, self.limit_gib) if value is not None), default=None)


def candidates(subject: Subject, wish: Wish) -> tuple[list[Candidate], list[str]]:
    """Return configurations with the requested figure, and what was left out.

    A configuration is left out if one of its trials failed with at least as much memory as the trials of its figures,
    or as the budget."""
    points: dict[Settings, list[Trial]] = {}
    for trial in subject.trials:
        point = tuple((key, value) for key, value in settings(trial) if key != LIMIT)
        points.setdefault(point, []).append(trial)
    measured = {trial.run_id for trial in subject.measured}
    run = {point: [trial for trial in told if trial.run_id in measured] for point, told in points.items()}
    points = {point: told for point, told in points.items() if run[point]}
    found, left_out, without = [], [], Counter[str]()
    for (point, told), label in zip(points.items(), labels(list(points)), strict=True):
        made = _candidate(label, told, run[point], wish)
        if made is None:
            without[wish.objective.why_absent(run[point][-1])] += 1
            continue
        if failed := _failed(made, told, wish):
            ended = " and ".join(dict.fromkeys(outcome_text(trial.outcome) for trial in failed))
            left_out.append(f"{label}: {count(len(run[point]), 'trial')} finished, others did not: {ended}")
            continue
        found.append(made)
    if without:
        [(why, _)] = without.most_common(1)
        several = "for example, " if len(without) > 1 else ""
        number = count(without.total(), "configuration")
        left_out.append(f"{number} without {wish.objective.title}: {several}{why}")
    if not found:
        raise InvalidInput(
            f"no configuration has {wish.objective.title} with all of its trials finished. {subject.text}: "
            + "; ".join(left_out)
        )
    return _told_apart(found), left_out


def within(found: Sequence[Candidate], wish: Wish) -> tuple[list[Candidate], list[str]]:
    """Return the candidates that fit the budget, and what was left out."""
    if wish.vram_gib is None:
        return list(found), []
    fitting = [one for one in found if one.fit is not None and one.fit.largest is not None]
    beyond = [one for one in found if one.fit is not None and one.fit.largest is None]
    unknown = len(found) - len(fitting) - len(beyond)
    left_out = []
    if beyond:
        text = f"{count(len(beyond), 'configuration')} beyond {wish.vram_gib:g} GiB"
        out = [one.label for one in beyond if one.ran_out]
        if out:
            more = f" and {len(out) - _NAMED} more" if len(out) > _NAMED else ""
            text += f"; {len(out)} of them ran out of memory within it: {', '.join(out[:_NAMED])}{more}"
        if may := sum(one.fit is not None and one.fit.next_may_fit for one in beyond):
            text += f"; {may} of them may fit without torch's unused cache: try vram_limit_gib={wish.vram_gib:g}"
        left_out.append(text)
    left_out += [f"{count(unknown, 'configuration')}: not enough data to say whether they fit"] if unknown else []
    return fitting, left_out


def in_time(found: Sequence[Candidate], wish: Wish) -> tuple[list[Candidate], list[str]]:
    """Return the candidates whose jobs all took no longer than the wish allows, and what was left out."""
    if wish.hours is None:
        return list(found), []
    known = [one for one in found if HOURS.name in one.figures]
    kept = [one for one in known if one.figures[HOURS.name].high <= wish.hours]
    left_out = []
    if gone := len(known) - len(kept):
        left_out.append(f"{count(gone, 'configuration')} beyond {wish.hours:g} h")
    if unknown := len(found) - len(known):
        left_out.append(f"{count(unknown, 'configuration')} without a recorded length of the job")
    return kept, left_out


def _candidate(label: str, told: Sequence[Trial], measured: Sequence[Trial], wish: Wish) -> Candidate | None:
    """Build a candidate; None if no trial has the requested figure."""
    having = {_at_hand(trial) for trial in measured if wish.objective.of(trial) is not None}
    if not having:
        return None
    chosen = _nearest(having, math.inf if wish.vram_gib is None else wish.vram_gib)
    trials = [trial for trial in measured if _at_hand(trial) == chosen]
    fit, ran_out = None, False
    if wish.vram_gib is not None:
        fit = next(iter(fits(told, (), [wish.vram_gib])), None)
        ran_out = any(
            trial.outcome == Outcome.out_of_memory.value and _at_hand(trial) >= wish.vram_gib for trial in told
        )
    return Candidate(
        label=label,
        trials=tuple(trials),
        figures=_figures(trials),
        aside=len(measured) - len(trials),
        fit=fit,
        ran_out=ran_out,
    )


def _at_hand(trial: Trial) -> float:
    """Return the emulated capacity in GiB; infinite on a whole card."""
    limit = trial.params.get(LIMIT, "None")
    return math.inf if limit == "None" else float(limit)


def _nearest(limits: set[float], budget: float) -> float:
    """Return the largest limit within the budget, else the smallest beyond it."""
    return max((limit for limit in limits if limit <= budget), default=min(limits))


def _failed(made: Candidate, told: Sequence[Trial], wish: Wish) -> list[Trial]:
    """Return the failed trials that disqualify the candidate; none if they only show that it does not fit."""
    if made.fit is not None and made.fit.largest is None:
        return []
    least = min(_at_hand(made.trials[0]), math.inf if wish.vram_gib is None else wish.vram_gib)
    return [trial for trial in told if not trial.finished and _at_hand(trial) >= least]


def _told_apart(found: Sequence[Candidate]) -> list[Candidate]:
    """Add the memory limit to the labels if it is not the same for all."""
    if len({one.limit_gib for one in found}) == 1:
        return list(found)
    return [
        one if one.limit_gib is None else replace(one, label=f"{one.label} (within {one.limit_gib:g} GiB)")
        for one in found
    ]


def _figures(trials: Sequence[Trial]) -> dict[str, Figure]:
    found = {}
    for measure in (*OBJECTIVES, *OF_JOBS):
        values = [value for trial in trials if (value := measure.of(trial)) is not None and math.isfinite(value)]
        if values:
            found[measure.name] = Figure(
                median=statistics.median(values), low=min(values), high=max(values), n=len(values)
            )
    return found
