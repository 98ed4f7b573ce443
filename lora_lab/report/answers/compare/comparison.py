"""Compare two trials or two sweeps: which settings, surroundings and results differ, and whether the difference
is beyond noise."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_lab.config import InvalidInput
from lora_lab.report.answers.compare.matched import WITHIN_RUNS, MatchedPoint, matched_difference
from lora_lab.report.answers.compare.outcomes import OutcomeChange, ended
from lora_lab.report.measures import OBJECTIVES, Better, Measure
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.kinds import kind_of
from lora_lab.report.statistics.settings import ABSENT, by_point, labels, settings
from lora_lab.report.writing.labels import count
from lora_lab.store.trials import Group, Sweep, Trial, groups

BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference seen"
WITHIN = "within tolerance"
CANNOT_TELL = "inconclusive"

EXIT_SAME = 0
EXIT_WORSE = 1
EXIT_NOT_TOLD = 3

Found = tuple[Sequence[Trial], Sequence[Sweep]]
"""Trials, and the sweeps that they belong to, as a store gives them back."""

_ID = 12
"""Characters of an id that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two."""

    name: str
    """Its display name."""
    trials: tuple[Trial, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedFact:
    """A setting, or a fact of the surroundings, that is not the same on both sides."""

    what: str
    one: str
    """Its values there, by the alphabet; "absent" where it has none."""
    other: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PointMedians:
    """A point on both sides: medians."""

    label: str
    one: float
    other: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measure on both sides."""

    measure: Measure
    verdict: str
    """better, worse, no difference seen, within tolerance, inconclusive: of `one`, against `other`."""
    estimate: Estimate | None
    """one over other, the mean over the matched points: of logarithms for ratios. None where there is no figure."""
    basis: str
    """What the interval is made of, and what is not in it; why there is none."""
    rows: tuple[PointMedians, ...]
    alarms: bool
    """Whether it is worse beyond noise and beyond the tolerance."""
    lacking: bool
    """Whether it is inconclusive although the other side has figures: a regression is not excluded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideComparison:
    """`one` against `other`."""

    one: Side
    other: Side
    tolerance: float
    """How much worse (a share) is acceptable."""
    cautions: tuple[str, ...]
    """What to know before reading on."""
    settings: tuple[ChangedFact, ...]
    surroundings: tuple[ChangedFact, ...]
    results: tuple[Result, ...]
    outcomes: tuple[OutcomeChange, ...]
    matched: int
    """Points on both sides."""
    only_one: tuple[str, ...]
    """Points that only `one` has."""
    only_other: tuple[str, ...]
    alike: int
    """Points that ended the same way on both sides, finished or not."""


def compare(one: Found, other: Found, tolerance: float = 0.0) -> SideComparison:
    """Compare `one` (the new) with `other` (the reference).

    Points are matched by equal settings, of those that both sides know. A setting that has one value throughout on one
    side and another throughout on the other is what the comparison is about, and is not matched by; so two lone trials
    are compared whatever their settings.

    A regression is reported with a risk of at most 2.5 % a measure where nothing changed, as far as repeats show how
    runs differ. One trial on each side does not: its own errors are smaller than that (of 88 pairs of equal H100 trials
    they called 42 different in energy), so it takes a tolerance to call one worse than the other.

    Args:
        one: trials, and the sweeps that they belong to.
        other: the same of the other side.
        tolerance: how much worse is acceptable: 0.02 for 2 percent.

    Raises: InvalidInput when a side is empty, when one side has jobs and the other windows, or when the tolerance is
    negative."""
    if tolerance < 0 or not math.isfinite(tolerance):
        raise InvalidInput(f"--tolerance {tolerance:g} is negative or not a number. Give a share, such as 2% or 0.02.")
    _check_kinds(one[0], other[0])
    return _compared(_side(one), _side(other), tolerance)


def exit_code(comparison: SideComparison) -> int:
    """Return 1 if something is worse beyond noise and the tolerance; else 3 if a measure that the other side has
    figures for, or everything, is inconclusive; else 0."""
    if any(result.alarms for result in comparison.results) or any(each.worse for each in comparison.outcomes):
        return EXIT_WORSE
    if any(result.lacking for result in comparison.results):
        return EXIT_NOT_TOLD
    told = any(result.verdict != CANNOT_TELL for result in comparison.results)
    return EXIT_SAME if told or comparison.outcomes else EXIT_NOT_TOLD


def _check_kinds(one: Sequence[Trial], other: Sequence[Trial]) -> None:
    """Raise InvalidInput unless all trials are jobs, or all are windows."""
    kinds = [{kind_of(trial) for trial in side} for side in (one, other)]
    if len(set().union(*kinds)) > 1:
        named = " against ".join(" and ".join(sorted(f"{kind}s" for kind in each)) for each in kinds)
        raise InvalidInput(
            f"{named}: figures of a measured window and of a whole training are not compared. Name sweeps or trials "
            "of one kind on both sides."
        )


def _side(found: Found) -> Side:
    trials, sweeps = found
    if not trials:
        raise InvalidInput("one of the two sides has no trials; name a sweep or trial that has some.")
    if len(trials) == 1:
        return Side(name=f"trial {trials[0].name} ({trials[0].run_id[:_ID]})", trials=tuple(trials))
    names = [f"{sweep.name} ({sweep.run_id[:_ID]})" for sweep in sweeps]
    return Side(name=", ".join(names) or f"{len(trials)} trials of no sweep", trials=tuple(trials))


def _compared(one: Side, other: Side, tolerance: float) -> SideComparison:
    ours, theirs = groups(one.trials), groups(other.trials)
    here, there = ours[0], theirs[0]
    differing = _settings_apart(one.trials, other.trials)
    known = _matched_by(_of(one, here), _of(other, there))
    pairs, only_one, only_other = _pairs(here.measured, there.measured, known)
    outcomes, alike = ended(_of(one, here), _of(other, there), known)
    return SideComparison(
        one=one,
        other=other,
        tolerance=tolerance,
        cautions=(
            *_cautions(ours, theirs, _throughout(_of(one, here), _of(other, there))),
            *_of_drift(one, other, tolerance),
        ),
        settings=tuple(differing),
        surroundings=tuple(_surroundings(one.trials, other.trials)),
        results=tuple(_result(measure, pairs, there.measured, tolerance) for measure in OBJECTIVES),
        outcomes=tuple(outcomes),
        matched=len(pairs),
        only_one=tuple(only_one),
        only_other=tuple(only_other),
        alike=alike,
    )


def _of(side: Side, group: Group) -> list[Trial]:
    """Return the side's trials in this environment, including excluded ones."""
    there = {trial.run_id for trial in (*group.trials, *(each.trial for each in group.excluded))}
    return [trial for trial in side.trials if trial.run_id in there]


def _throughout(one: Sequence[Trial], other: Sequence[Trial]) -> dict[str, tuple[str, str]]:
    """Return settings with one value on one side and another value on the other."""
    ours, theirs = _values(one), _values(other)
    return {
        key: (next(iter(ours[key])), next(iter(theirs[key])))
        for key in sorted(ours.keys() & theirs.keys())
        if len(ours[key]) == len(theirs[key]) == 1 and ours[key] != theirs[key]
    }


def _matched_by(one: Sequence[Trial], other: Sequence[Trial]) -> frozenset[str]:
    every = [{key for key, _ in settings(trial)} for trial in (*one, *other)]
    return frozenset(set.intersection(*every) - _throughout(one, other).keys())


def _values(trials: Sequence[Trial]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for trial in trials:
        for key, value in settings(trial):
            found.setdefault(key, set()).add(value)
    return found


def _settings_apart(one: Sequence[Trial], other: Sequence[Trial]) -> Iterator[ChangedFact]:
    yield from _apart(_values(one), _values(other))


def _surroundings(one: Sequence[Trial], other: Sequence[Trial]) -> Iterator[ChangedFact]:
    yield from _apart(_tags(one), _tags(other))


_FACTS = (
    "device",
    "device.",
    "version.",
    "machine.",
    "ran.",
    "commit",
    "code",
    "code.",
    "dirty",
    "process.host",
    "regime",
)
"""Tags that say where and on what trials ran; those with a dot are beginnings."""


def _tags(trials: Sequence[Trial]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for trial in trials:
        for key, value in trial.tags.items():
            if key in _FACTS or f"{key.partition('.')[0]}." in _FACTS:
                found.setdefault(key, set()).add(value)
    return found


def _apart(ours: Mapping[str, set[str]], theirs: Mapping[str, set[str]]) -> Iterator[ChangedFact]:
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(key, {ABSENT}), theirs.get(key, {ABSENT})
        if one != other:
            yield ChangedFact(what=key, one=", ".join(sorted(one)), other=", ".join(sorted(other)))


def _cautions(
    ours: Sequence[Group], theirs: Sequence[Group], throughout: Mapping[str, tuple[str, str]]
) -> Iterator[str]:
    here, there = ours[0].place, theirs[0].place
    if here.device != there.device:
        yield (
            f"different cards: {here.device} against {there.device}. The differences below may come from the cards as "
            "well as from anything else that changed"
        )
    elif here.unit != there.unit:
        yield (
            f"two devices with the same name ({here.device}): {here.unit} against {there.unit}; they may perform "
            "differently"
        )
    if here.versions != there.versions:
        yield f"different versions: {here.versions} against {there.versions}"
    for name, place in (("this", here), ("the other", there)):
        if place.dirty:
            yield f"{name} ran uncommitted code: its commit does not identify what ran"
    for name, found in (("this", ours), ("the other", theirs)):
        if len(found) > 1:
            left = sum(len(group.trials) for group in found[1:])
            where = f"{found[0].place.device} ({found[0].place.unit}, code {found[0].place.code})"
            yield f"{name} ran in {len(found)} environments: only {where} is compared, {count(left, 'trial')} left out"
    told = [f"{key} {one} against {other}" for key, (one, other) in throughout.items()]
    leaves = [text for text in told if "." not in text.split()[0]] or told
    if leaves:
        yield f"they differ in all trials in {', '.join(leaves)}: this is what is compared"


def _of_drift(one: Side, other: Side, tolerance: float) -> Iterator[str]:
    """Yield a caution if no sweep ran both in turns: drift between the two times then looks like an effect."""
    if {trial.sweep for trial in one.trials if trial.sweep} & {trial.sweep for trial in other.trials if trial.sweep}:
        return
    text = (
        "the two ran at different times. Drift between them (clocks, temperature, other load on the host) is not "
        "included in the intervals below"
    )
    yield text + ("" if tolerance else "; set --tolerance to what is acceptable, or run both in one sweep")


def _pairs(
    one: Sequence[Trial], other: Sequence[Trial], known: frozenset[str]
) -> tuple[list[MatchedPoint], list[str], list[str]]:
    """Measured points of both sides, and the labels of those that only one of them has."""
    ours, theirs = by_point(one, known), by_point(other, known)
    points = list(ours | theirs)
    names = dict(zip(points, labels(points), strict=True))
    pairs = [
        MatchedPoint(label=names[point], one=tuple(ours[point]), other=tuple(theirs[point]))
        for point in ours
        if point in theirs
    ]
    return (
        pairs,
        [names[point] for point in ours if point not in theirs],
        [names[point] for point in theirs if point not in ours],
    )


def _result(measure: Measure, pairs: Sequence[MatchedPoint], there: Sequence[Trial], tolerance: float) -> Result:
    """Compare one measure. `there` are the other side's measured trials, matched or not."""
    kept = [kept for pair in pairs if (kept := pair.having(measure)) is not None]
    if not kept:
        why = (
            f"no figure on both sides: {_why_absent(measure, pairs)}"
            if pairs
            else "no point was measured on both sides"
        )
        return Result(
            measure=measure,
            verdict=CANNOT_TELL,
            estimate=None,
            basis=why,
            rows=(),
            alarms=False,
            lacking=any(measure.of(trial) is not None for trial in there),
        )
    found, basis = matched_difference(kept, measure)
    rows = tuple(
        PointMedians(label=pair.label, one=_median(pair.one, measure), other=_median(pair.other, measure))
        for pair in kept
    )
    lost = len([pair for pair in pairs if any(measure.of(trial) is not None for trial in pair.other)]) - len(kept)
    basis += f"; {count(lost, 'point')} left out because this side has no figure for them" if lost else ""
    verdict = _verdict(found, measure, rows, tolerance)
    beyond = _beyond(found, measure, rows, tolerance)
    if verdict in (BETTER, WORSE) and basis.startswith(WITHIN_RUNS) and not (tolerance and beyond):
        verdict = CANNOT_TELL
        basis += "; repeat with repeats=5, or set --tolerance to how much they may differ"
    return Result(
        measure=measure,
        verdict=verdict,
        estimate=found,
        basis=basis,
        rows=rows,
        alarms=verdict == WORSE and beyond,
        lacking=verdict == CANNOT_TELL,
    )


def _verdict(found: Estimate, measure: Measure, rows: Sequence[PointMedians], tolerance: float) -> str:
    if found.low is None or found.high is None:
        return CANNOT_TELL
    if tolerance and all(abs(share) <= tolerance for share in _shares((found.low, found.high), measure, rows)):
        return WITHIN
    if not found.seen:
        return NO_DIFFERENCE
    return BETTER if (found.value > 0) == (measure.better is Better.higher) else WORSE


def _beyond(found: Estimate, measure: Measure, rows: Sequence[PointMedians], tolerance: float) -> bool:
    """Return whether the whole interval lies beyond the tolerance."""
    if not found.seen or found.low is None or found.high is None:
        return False
    return min(abs(share) for share in _shares((found.low, found.high), measure, rows)) > tolerance


def _shares(differences: Sequence[float], measure: Measure, rows: Sequence[PointMedians]) -> list[float]:
    """Return differences as shares of the other's figure."""
    if measure.ratios:
        return [math.expm1(difference) for difference in differences]
    middle = statistics.fmean(row.other for row in rows)
    return [difference / middle for difference in differences]


def _why_absent(measure: Measure, pairs: Sequence[MatchedPoint]) -> str:
    lacking = (trial for pair in pairs for trial in (*pair.one, *pair.other) if measure.of(trial) is None)
    return measure.why_absent(next(lacking))


def _median(trials: Sequence[Trial], measure: Measure) -> float:
    return statistics.median(value for trial in trials if (value := measure.of(trial)) is not None)
