"""The content of a report as data; terminal and page only format it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_lab.config import InvalidInput
from lora_lab.report.answers.auto import Judged, answers_of, judged_contrasts
from lora_lab.report.answers.claims.judge import judge
from lora_lab.report.answers.claims.required_effect import Needed, needed
from lora_lab.report.answers.claims.study import Study
from lora_lab.report.answers.claims.verdict import Verdict
from lora_lab.report.answers.contenders import Contenders, Curves, compared_trials, contenders
from lora_lab.report.answers.estimates import Estimates, estimates
from lora_lab.report.answers.fits import Fit, fits
from lora_lab.report.answers.learnt import Learnt, learnt
from lora_lab.report.answers.pareto import Point, front, points
from lora_lab.report.answers.quality import QualityFront, quality_fronts
from lora_lab.report.measures import ENERGY, GPU_WORK, HOURS, KNOWN, KWH, MEASURES, THROUGHPUT, VRAM, Measure
from lora_lab.report.statistics.attribution import Split, split
from lora_lab.report.statistics.blocks import figures
from lora_lab.report.statistics.contrasts import Contrast, contrasts
from lora_lab.report.statistics.differences import by_block, difference, pooled_noise
from lora_lab.report.statistics.factorial import FactorialModel, factorial
from lora_lab.report.statistics.factors import Design, Factor, design, taken_apart
from lora_lab.report.statistics.kinds import Kind, groups_alike, kind_of_group
from lora_lab.report.statistics.pooling import PooledContrast, Session, pooled_contrasts
from lora_lab.store.trials import Group, Sweep, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The factorial model of one measure over one sweep's points of one regime."""

    measure: Measure
    sweep: str | None
    """Run id of the sweep."""
    regime: str
    model: FactorialModel | str
    """Text says why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFindings:
    """Findings of one environment, of trials of one kind."""

    group: Group
    kind: Kind
    design: Design
    points: tuple[Point, ...]
    compared: tuple[Factor, ...]
    """The factors that contrasts are about: those of the design, split where pairs separate their settings."""
    contrasts: tuple[Contrast, ...]
    """Of every measure that has figures."""
    judged: Judged
    """Those that repeats=auto answers. Their 95 % intervals take no account of its looks."""
    models: tuple[Fitted, ...]
    splits: tuple[Split, ...]
    needed: tuple[Needed, ...]
    fits: tuple[Fit, ...]
    estimates: Estimates | None
    """What became of the estimates of memory; None where no record has one. Places are those of `points`."""
    fronts: Mapping[str, tuple[Point, ...]]
    """Pareto fronts of throughput against energy and memory, by that measure's name."""
    quality: tuple[QualityFront, ...]
    """Pareto fronts of held-out loss against each cost; places are those of `points`."""
    learnt: tuple[Learnt | None, ...]
    """The held-out loss of each point, as `points`; None for a point without one."""
    as_fast: int
    """How many points are not distinguishable from the one of the highest median throughput."""
    absent: Mapping[str, str]
    """Measures that no trial has, by name, and why."""

    @property
    def shown(self) -> list[Measure]:
        """Return the measures that some point has."""
        return [measure for measure in KNOWN if any(measure.name in point.figures for point in self.points)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """A report's whole content."""

    title: str
    sweeps: tuple[Sweep, ...]
    answers: tuple[str, ...]
    """Of the sweeps with repeats=auto, in words."""
    contenders: tuple[Contenders, ...]
    """Of the sweeps by halving, by sweep and place."""
    groups: tuple[GroupFindings, ...]
    """By place and kind, the one with most measured trials first."""
    pooled: tuple[PooledContrast, ...]
    """Contrasts that several sessions have (sweeps, or places), and their mean over these. Not of memory, which repeats
    to the byte."""
    verdicts: tuple[tuple[Study, tuple[Verdict, ...]], ...]
    """Of the studies about which the trials show anything."""
    commands: tuple[str, ...]
    """Commands that reproduce the trials, then this report."""
    version: str
    """Of lora_lab, which wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a user wants to know beyond the trials themselves."""

    baseline: Mapping[str, str] | None = None
    """The levels that others are compared with."""
    ends: tuple[Mapping[str, str], Mapping[str, str]] | None = None
    """Settings of the two points whose difference is to be split; by default a study's, else baseline and fastest."""
    studies: tuple[Study, ...] = ()
    command: str = "python -m lora_lab.report"


def find(
    trials: Sequence[Trial], sweeps: Sequence[Sweep], question: Question, version: str, curves: Curves | None = None
) -> Findings:
    """Return all findings about these trials.

    Args:
        curves: series of the trials, for the losses of contenders at equal cost.

    Raises: InvalidInput when there are none, or `question` names a setting that none has."""
    if not trials:
        raise InvalidInput("there are no trials to report. Run some: python -m lora_lab -m batch_size=1,2 repeats=5")
    rivals = contenders(trials, curves or {})
    trials = compared_trials(trials)
    alike = groups_alike(trials)
    found = tuple(_of_group(group, sweeps, question, is_main=group is alike[0]) for group in alike)
    pooled = [measure for measure in MEASURES if measure is not VRAM]
    judged = [(study, tuple(judge(study, [_alone(each.group) for each in found]))) for study in question.studies]
    verdicts = tuple((study, said) for study, said in judged if any(verdict.seen for verdict in said))
    return Findings(
        title=_title(trials, sweeps),
        sweeps=tuple(sweeps),
        answers=tuple(line for sweep in sweeps for line in answers_of(sweep, trials)),
        contenders=tuple(rivals),
        groups=found,
        pooled=tuple(
            contrast
            for kind in Kind
            for contrast in pooled_contrasts(_sessions([each for each in found if each.kind is kind]), pooled)
        ),
        verdicts=verdicts,
        commands=(*_commands(trials, sweeps), question.command),
        version=version,
    )


def _alone(group: Group) -> Group:
    """Leave out trials that trained together: a study's figures are those of trials alone."""
    trials, measured = ([each for each in some if not each.is_member] for some in (group.trials, group.measured))
    return replace(group, trials=tuple(trials), measured=tuple(measured))


def _sessions(found: Sequence[GroupFindings]) -> list[Session]:
    """Return the sweeps of each place; trials of no sweep are one more."""
    by_session: dict[tuple[int, str | None], list[Trial]] = {}
    for number, each in enumerate(found):
        for trial in each.group.measured:
            by_session.setdefault((number, trial.sweep), []).append(trial)
    return [
        Session(place=found[number].group.place.label, trials=trials, factors=found[number].compared)
        for (number, _), trials in by_session.items()
    ]


def _of_group(group: Group, sweeps: Sequence[Sweep], question: Question, is_main: bool) -> GroupFindings:
    """Return the findings of one environment.

    Raises: InvalidInput when `question` names a setting that the main group has not; others note it."""
    measures = [measure for measure in MEASURES if any(measure.of(trial) is not None for trial in group.measured)]
    try:
        varied = design(group.trials, sweeps, question.baseline)
    except InvalidInput as refusal:
        if is_main:
            raise
        varied = design(group.trials, sweeps)
        varied = replace(varied, notes=(*varied.notes, f"a different baseline was used: {refusal}"))
    factors = varied.factors
    compared = _compared(group, factors)
    found = points(group.trials, group.measured, factors)
    splits, how_much = _splits(group, factors, found, question, measures)
    others = [measure for measure in measures if measure in (ENERGY, VRAM) and THROUGHPUT in measures]
    kind, usable = kind_of_group(group), {trial.run_id for trial in group.measured}
    by_point = [[trial for trial in point.trials if trial.run_id in usable] for point in found]
    expected = (*MEASURES, HOURS, KWH) if kind is Kind.job else MEASURES
    return GroupFindings(
        group=group,
        kind=kind,
        design=varied,
        points=tuple(found),
        compared=compared,
        contrasts=tuple(each for measure in measures for each in contrasts(group.measured, compared, measure)),
        judged=judged_contrasts(sweeps, group.trials, compared),
        models=tuple(_models(group, found, factors, measures)),
        splits=splits,
        needed=how_much,
        fits=tuple(fits(group.trials, factors)),
        estimates=estimates(found),
        fronts={measure.name: tuple(front(found, THROUGHPUT, measure)) for measure in others},
        quality=tuple(quality_fronts(by_point)),
        learnt=tuple(learnt(by_point)),
        as_fast=_as_fast(found, group),
        absent={
            m.name: _why_absent(m, group) for m in expected if not any(m.of(t) is not None for t in group.measured)
        },
    )


def _as_fast(found: Sequence[Point], group: Group) -> int:
    """Count the points that are not seen to differ from the fastest. The others are, all together with 95 %."""
    by_run = {each.trial.run_id: each for each in figures(group.measured, THROUGHPUT)}
    rated = [
        (
            point.figures[THROUGHPUT.name][0],
            by_block(by_run[trial.run_id] for trial in point.trials if trial.run_id in by_run),
        )
        for point in found
        if THROUGHPUT.name in point.figures
    ]
    if not rated:
        return 0
    fastest = max(rated, key=lambda one: one[0])
    noise = pooled_noise(values for _, values in rated)
    others = (difference(one[1], fastest[1]) for one in rated if one is not fastest)
    return sum(not each.is_seen(noise, among=len(rated) - 1) for each in others)


def _compared(group: Group, factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Split aliased factors where pairs separate their settings.

    In a pair all else is equal, so one stray point that aliases two settings does not affect the pairs of the rest.
    Settings aliased in all trials have no such pairs."""
    made: list[Factor] = []
    for factor in factors:
        parts = taken_apart(factor, group.measured)
        paired = len(parts) > 1 and any(contrasts(group.measured, parts, measure) for measure in MEASURES)
        made += parts if paired else [factor]
    return tuple(made)


def _why_absent(measure: Measure, group: Group) -> str:
    """Return the reason that most trials give."""
    reasons = Counter(measure.why_absent(trial) for trial in group.measured)
    return reasons.most_common(1)[0][0] if reasons else "no trial finished with figures that can be compared"


def _models(
    group: Group, found: Sequence[Point], factors: Sequence[Factor], measures: Sequence[Measure]
) -> list[Fitted]:
    """Fit one model per measure, sweep and regime.

    Sweeps share no blocks, and regimes differ in noise and in bottleneck. Memory repeats to the byte, so it is not
    fitted."""
    fitted = [measure for measure in measures if measure is not VRAM]
    made = []
    for sweep, regime in dict.fromkeys((trial.sweep, point.regime) for point in found for trial in point.trials):
        inside = [
            trial
            for point in found
            if point.regime == regime
            for trial in point.trials
            if trial.sweep == sweep and trial in group.measured
        ]
        seen = {factor.name: {factor.level(trial) for trial in inside} for factor in factors}
        varied = [_with_levels(factor, seen[factor.name]) for factor in factors if len(seen[factor.name]) > 1]
        if varied:
            made += [Fitted(measure=m, sweep=sweep, regime=regime, model=factorial(inside, varied, m)) for m in fitted]
    return made


def _with_levels(factor: Factor, levels: set[str]) -> Factor:
    kept = tuple(level for level in factor.levels if level in levels)
    return Factor(name=factor.name, keys=factor.keys, levels=kept)


def _splits(
    group: Group,
    factors: Sequence[Factor],
    found: Sequence[Point],
    question: Question,
    measures: Sequence[Measure],
) -> tuple[tuple[Split, ...], tuple[Needed, ...]]:
    """Split the difference between the two requested points.

    By default between those of a study's claims if both were measured, else from the baseline to the fastest."""
    asked = [measure for measure in (THROUGHPUT, GPU_WORK, ENERGY) if measure in measures]
    measured = [point for point in found if point.figures]
    if not asked or not factors or not measured:
        return (), ()
    claims = [(study, claim) for study in question.studies for claim in study.claims if claim.ends is not None]
    if question.ends is None:
        for study, claim in claims:
            start, end = (_nearest(measured, factors, study.settings(name)) for name in claim.ends or ())
            if start is not None and end is not None and start is not end:
                made = tuple(split(group.measured, factors, m, start.levels, end.levels) for m in asked)
                how_much = needed(study, claim, made)
                return made, () if how_much is None else (how_much,)
        return _from_baseline_to_fastest(group, factors, measured, asked), ()
    ends = [_nearest(measured, factors, settings) for settings in question.ends]
    for point, settings in zip(ends, question.ends, strict=True):
        if point is None:
            told = ",".join(f"{key}={value}" for key, value in settings.items())
            there = "; ".join(point.label for point in measured[:12])
            raise InvalidInput(f"--split {told}: no measured point has these settings. There are: {there}.")
    if ends[0] is ends[1]:
        raise InvalidInput("--split names one point twice; give two that differ.")
    return tuple(
        split(group.measured, factors, m, ends[0].levels, ends[1].levels) for m in asked if ends[0] and ends[1]
    ), ()


def _from_baseline_to_fastest(
    group: Group, factors: Sequence[Factor], measured: Sequence[Point], asked: Sequence[Measure]
) -> tuple[Split, ...]:
    rated = [point for point in measured if THROUGHPUT.name in point.figures]
    start = next((p for p in rated if all(p.levels[f.name] == f.levels[0] for f in factors)), None)
    end = max(rated, key=lambda point: point.figures[THROUGHPUT.name][0], default=None)
    if start is None or end is None or start is end:
        return ()
    return tuple(split(group.measured, factors, measure, start.levels, end.levels) for measure in asked)


def _nearest(measured: Sequence[Point], factors: Sequence[Factor], settings: Mapping[str, str]) -> Point | None:
    """Return the point with these settings; for a factor they leave open, with its usual level."""

    def has(point: Point) -> bool:
        return all(point.trials[0].params.get(key) == value for key, value in settings.items())

    usual = {f.name: Counter(point.levels[f.name] for point in measured).most_common(1)[0][0] for f in factors}
    fitting = [point for point in measured if has(point)]
    return max(
        fitting, key=lambda point: sum(point.levels[name] == level for name, level in usual.items()), default=None
    )


def _title(trials: Sequence[Trial], sweeps: Sequence[Sweep]) -> str:
    if not sweeps:
        return trials[0].name if len(trials) == 1 else f"{len(trials)} trials"
    names = list(dict.fromkeys(sweep.name for sweep in sweeps))
    return ", ".join(names) + (f" ({len(sweeps)} sweeps)" if len(sweeps) > len(names) else "")


def _commands(trials: Sequence[Trial], sweeps: Sequence[Sweep]) -> list[str]:
    """Return the command lines of the sweeps and of trials without a sweep."""
    alone = [trial.tags for trial in trials if trial.sweep is None]
    told = [tags["command"] for tags in [*(sweep.tags for sweep in sweeps), *alone] if "command" in tags]
    return list(dict.fromkeys(told))
