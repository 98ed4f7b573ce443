"""Which of the measured configurations to use: the best by one measure of those that fit, and how sure that is."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_lab.config import RefusedInput
from lora_lab.report.best.subject import Subject, others, subjects
from lora_lab.report.effects.estimates import Estimate, estimate
from lora_lab.report.effects.resolution import no_finer
from lora_lab.report.labels import count, outcome_text
from lora_lab.report.measures import LOSS, MEASURES, VRAM, Better, Measure
from lora_lab.report.settings import Settings, by_point, labels
from lora_lab.report.trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for."""

    objective: Measure
    vram_gib: float | None = None
    """What the card's peak may be at most, in GiB; None for no limit."""
    max_loss_increase: float | None = None
    """How far above the lowest held-out loss it may be, as a share of that: 0.01 for one percent."""
    model: str | None = None
    """Option or name of the model; None for that of the newest trial."""
    card: str | None = None
    """Part of the card's name, or the beginning of its UUID; None for that of the newest trial."""


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
    """A configuration with its measured trials: equal in everything but seed and repeat."""

    label: str
    trials: tuple[Trial, ...]
    figures: Mapping[str, Figure]
    """By measure name; a measure that a trial lacks is taken over the others."""

    @property
    def limit_gib(self) -> float | None:
        """The emulated capacity that it ran within; None on a whole card."""
        limit = self.trials[0].params.get("vram_limit_gib", "None")
        return None if limit == "None" else float(limit)

    @property
    def needs_gib(self) -> float | None:
        """The card's highest peak, or the emulated capacity that sufficed if that is less; None where neither is
        known."""
        peak = self.figures[VRAM.name].high if VRAM.name in self.figures else None
        return min((value for value in (peak, self.limit_gib) if value is not None), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A candidate that is not the best, beside the best."""

    candidate: Candidate
    estimate: Estimate
    """Its figure over the best one's: a difference of logarithms for ratios, else plain."""
    how: str
    """What the interval is made of; "" without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The answer."""

    wish: Wish
    subject: Subject
    best: Candidate | None
    """None when nothing fits."""
    runners_up: tuple[RunnerUp, ...]
    """The best of them first."""
    least: Candidate | None
    """When nothing fits: what needs least."""
    left_out: tuple[str, ...]
    """What was no candidate, and why."""
    sure: str
    """How sure it is, in words."""
    remarks: tuple[str, ...]
    others: tuple[str, ...]
    """What else there is, and how to choose it."""


def choose(trials: Sequence[Trial], wish: Wish) -> Choice:
    """Answer.

    Models, data, lengths of the window, cards, versions and code are never mixed: the newest trial says which model,
    data, window and card, and of the places with that the one with most measured trials is taken.

    Raises: RefusedInput when nothing is measured, or what is asked can't be told from it."""
    found = subjects(trials, wish.model, wish.card)
    subject = found[0]
    _refuse_unanswerable(subject, wish)
    candidates, left_out = _candidates(subject, wish)
    fitting, too_large = _within(candidates, wish)
    left_out += too_large
    rest = tuple(others(found))
    if not fitting:
        least = min(candidates, key=lambda one: one.needs_gib or math.inf)
        return Choice(
            wish=wish,
            subject=subject,
            best=None,
            runners_up=(),
            least=least,
            left_out=tuple(left_out),
            sure="",
            remarks=(),
            others=rest,
        )
    fitting, worse = _learning(fitting, wish)
    ranked = sorted(fitting, key=_rank(wish.objective))
    best = ranked[0]
    runners_up = tuple(_beside(best, other, wish.objective) for other in ranked[1:])
    return Choice(
        wish=wish,
        subject=subject,
        best=best,
        runners_up=runners_up,
        least=None,
        left_out=tuple(left_out + worse),
        sure=_sure(runners_up),
        remarks=tuple(_remarks(best, runners_up, wish)),
        others=rest,
    )


def _refuse_unanswerable(subject: Subject, wish: Wish) -> None:
    measured = subject.measured
    if wish.max_loss_increase is not None and all(LOSS.of(trial) is None for trial in measured):
        raise RefusedInput(
            f"--max-loss-increase can't be kept here: {LOSS.why_absent(measured[-1])}. {subject.text}: leave the "
            "option out, or run trials with pretrained weights and measure.eval_rows above 0."
        )
    if wish.vram_gib is not None and all(VRAM.of(trial) is None and not _limited(trial) for trial in measured):
        raise RefusedInput(
            f"--vram {wish.vram_gib:g} can't be judged here: no trial has the card's peak "
            f"({VRAM.why_absent(measured[-1])}). {subject.text}: leave --vram out, or choose trials of a card with "
            "--card NAME."
        )
    if all(wish.objective.of(trial) is None for trial in measured):
        raise RefusedInput(
            f"no trial has {wish.objective.title}: {wish.objective.why_absent(measured[-1])}. {subject.text}: choose "
            "another --objective, or other trials with --model, --card or --sweep."
        )


def _limited(trial: Trial) -> bool:
    return trial.params.get("vram_limit_gib", "None") != "None"


def _candidates(subject: Subject, wish: Wish) -> tuple[list[Candidate], list[str]]:
    """The points whose every trial that was over was measured, and that have the figure asked for."""
    failed: dict[Settings, str] = {
        point: trial.outcome for point, told in by_point(subject.trials).items() for trial in told if not trial.finished
    }
    points = by_point(subject.measured)
    kept, unlike = [], []
    for (point, trials), label in zip(points.items(), labels(list(points)), strict=True):
        if point in failed:
            unlike.append(f"{label}: {_some_ended(len(trials), failed[point])}")
            continue
        kept.append(Candidate(label=label, trials=tuple(trials), figures=_figures(trials)))
    having = [one for one in kept if wish.objective.name in one.figures]
    if len(having) < len(kept):
        unlike.append(f"{count(len(kept) - len(having), 'configuration')} without {wish.objective.title}")
    if not having:
        raise RefusedInput(
            f"no configuration has {wish.objective.title} and finished in each of its trials. {subject.text}: "
            + "; ".join(unlike)
        )
    return having, unlike


def _some_ended(finished: int, outcome: str) -> str:
    return f"{count(finished, 'trial')} finished, but not each: {outcome_text(outcome)}"


def _figures(trials: Sequence[Trial]) -> dict[str, Figure]:
    found = {}
    for measure in MEASURES:
        values = [value for trial in trials if (value := measure.of(trial)) is not None and math.isfinite(value)]
        if values:
            found[measure.name] = Figure(
                median=statistics.median(values), low=min(values), high=max(values), n=len(values)
            )
    return found


def _within(candidates: Sequence[Candidate], wish: Wish) -> tuple[list[Candidate], list[str]]:
    if wish.vram_gib is None:
        return list(candidates), []
    fitting = [one for one in candidates if one.needs_gib is not None and one.needs_gib <= wish.vram_gib]
    beyond = sum(one.needs_gib is not None and one.needs_gib > wish.vram_gib for one in candidates)
    unknown = len(candidates) - len(fitting) - beyond
    left_out = [f"{count(beyond, 'configuration')} beyond {wish.vram_gib:g} GiB"] if beyond else []
    left_out += [f"{count(unknown, 'configuration')} whose peak on the card is not known"] if unknown else []
    return fitting, left_out


def _learning(candidates: Sequence[Candidate], wish: Wish) -> tuple[list[Candidate], list[str]]:
    """Those whose held-out loss is low enough.

    Raises: RefusedInput when none of them has one."""
    if wish.max_loss_increase is None:
        return list(candidates), []
    losses = {one.label: one.figures[LOSS.name].median for one in candidates if LOSS.name in one.figures}
    if not losses:
        raise RefusedInput(
            "--max-loss-increase can't be kept: none of the configurations that fit has a held-out loss. Run them with "
            "measure.eval_rows above 0."
        )
    most = min(losses.values()) * (1 + wish.max_loss_increase)
    kept = [one for one in candidates if losses.get(one.label, math.inf) <= most]
    gone = len(losses) - len(kept)
    left_out = [f"{count(gone, 'configuration')} with a held-out loss above {most:.4f}"] if gone else []
    unknown = len(candidates) - len(losses)
    left_out += [f"{count(unknown, 'configuration')} without a held-out loss"] if unknown else []
    return kept, left_out


def _rank(measure: Measure) -> Callable[[Candidate], tuple[float, float, str]]:
    sign = -1.0 if measure.better is Better.higher else 1.0
    return lambda one: (sign * one.figures[measure.name].median, one.needs_gib or math.inf, one.label)


def _beside(best: Candidate, other: Candidate, measure: Measure) -> RunnerUp:
    """The other over the best, with Student's interval: paired by block (one repeat of one sweep) where they share
    two or more, else unpaired with variances of their own (Welch). The best was picked by the same figures, so it
    looks a little better than it is: a runner-up that can't be told from it counts for more than one that can."""
    ours, theirs = _by_block(best, measure), _by_block(other, measure)
    shared = [block for block in ours if block in theirs]
    middle = best.figures[measure.name].median
    if len(shared) >= 2:
        apart = np.array([theirs[block] - ours[block] for block in shared])
        error = float(apart.std(ddof=1)) / math.sqrt(len(shared))
        found = no_finer(estimate(float(apart.mean()), error, len(shared) - 1), measure, middle)
        return RunnerUp(candidate=other, estimate=found, how=f"paired over {len(shared)} blocks")
    one, two = np.array(list(ours.values())), np.array(list(theirs.values()))
    value = float(two.mean() - one.mean())
    if len(one) < 2 or len(two) < 2:
        why = "one trial each" if len(one) == len(two) == 1 else "one of them has one trial"
        return RunnerUp(candidate=other, estimate=Estimate(value=value, why_no_interval=why), how="")
    error, df = _welch(one, two)
    found = no_finer(estimate(value, error, df), measure, middle)
    return RunnerUp(candidate=other, estimate=found, how=f"{len(one)} against {len(two)} trials, unpaired")


def _by_block(candidate: Candidate, measure: Measure) -> dict[tuple[str, int], float]:
    """Its figures on the measure's scale. A trial of no sweep is a block of its own."""
    found = {}
    for trial in candidate.trials:
        value = measure.of(trial)
        if value is not None and math.isfinite(value):
            block = (trial.run_id, -1) if trial.sweep is None else (trial.sweep, trial.repeat)
            found[block] = math.log(value) if measure.ratios else value
    return found


def _welch(one: np.ndarray, two: np.ndarray) -> tuple[float, float]:
    """Standard error of the difference of two means, and its degrees of freedom (Welch, Satterthwaite)."""
    parts = [float(sample.var(ddof=1)) / len(sample) for sample in (one, two)]
    total = sum(parts)
    if total == 0:
        return 0.0, float(len(one) + len(two) - 2)
    df = total**2 / sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, (one, two), strict=True))
    return math.sqrt(total), df


def _sure(runners_up: Sequence[RunnerUp]) -> str:
    if not runners_up:
        return "the only configuration left to choose from: nothing to compare it with"
    seen = [runner.estimate.seen for runner in runners_up]
    close, unknown = seen.count(False), seen.count(None)
    if unknown == len(seen):
        return (
            "one trial each: no interval, so nobody can say whether the order is chance; repeat with repeats=3"
            if all(runner.estimate.why_no_interval == "one trial each" for runner in runners_up)
            else "too few repeats for an interval, so nobody can say whether the order is chance; repeat with repeats=3"
        )
    parts = [f"{close} of {len(seen)} others cannot be told from the best" if close else ""]
    parts += [f"of {unknown} there are too few repeats to say" if unknown else ""]
    if not close and not unknown:
        parts = [f"told apart from each of {count(len(seen), 'other')} (95 % intervals, one by one)"]
    return "; ".join(filter(None, parts))


def _remarks(best: Candidate, runners_up: Sequence[RunnerUp], wish: Wish) -> list[str]:
    said = [*_of_figures(best), *_of_ties(best, runners_up), *_of_loss(best, runners_up, wish)]
    seen = [runner.estimate.seen for runner in runners_up]
    if False in seen and wish.objective != VRAM:
        said.append(
            f"picked among {len(seen) + 1} by the very figures that are shown, so expect it to do a little worse when "
            "it is run again"
        )
    return said


def _of_figures(best: Candidate) -> list[str]:
    said = []
    doubtful = sum(trial.tags.get("validity") == "doubtful" for trial in best.trials)
    if doubtful:
        why = {trial.tags.get("validity_reasons", "no reason kept") for trial in best.trials} - {"no reason kept"}
        said.append(f"{doubtful} of its {len(best.trials)} trials are doubtful: {'; '.join(sorted(why))}")
    regimes = sorted({trial.regime for trial in best.trials})
    if "host-bound" in regimes or "mixed" in regimes:
        said.append(f"{' and '.join(regimes)}: another card or a faster host may order them differently")
    if best.limit_gib is not None:
        said.append(
            f"measured within an emulated {best.limit_gib:g} GiB of a larger card, whose speed and power these are; on "
            "a card of that size leave vram_limit_gib out"
        )
        before = max((trial.metrics.get("card/used_before_gib", 0.0) for trial in best.trials), default=0.0)
        peak = best.figures.get(VRAM.name)
        if peak is not None and peak.high > best.limit_gib:
            said.append(
                f"of the card's peak, {before:.2f} GiB were in use before it began: the limit does not count them"
            )
    if best.trials[0].params.get("model.weights") == "random":
        said.append("the weights were random: speed, memory and energy hold, and nothing is said of what it learns")
    return said


def _of_ties(best: Candidate, runners_up: Sequence[RunnerUp]) -> list[str]:
    """The one that needs least memory of those that can't be told from the best."""
    ties = [runner.candidate for runner in runners_up if runner.estimate.seen is False]
    smaller = [one for one in ties if one.needs_gib and best.needs_gib and one.needs_gib < 0.99 * best.needs_gib]
    if not smaller or best.needs_gib is None:
        return []
    least = min(smaller, key=lambda one: one.needs_gib or math.inf)
    return [
        f"{least.label} cannot be told from it and needs {least.needs_gib:.2f} GiB in place of {best.needs_gib:.2f}"
    ]


def _of_loss(best: Candidate, runners_up: Sequence[RunnerUp], wish: Wish) -> list[str]:
    """What makes held-out losses of different configurations unlike, where they were compared."""
    if wish.objective != LOSS and wish.max_loss_increase is None:
        return []
    compared = [best, *(runner.candidate for runner in runners_up)]
    tokens = [seen for one in compared if (seen := _tokens_seen(one)) is not None]
    said = []
    if tokens and max(tokens) > 1.02 * min(tokens):
        said.append(
            f"held-out losses were taken after as many steps, not as many tokens: {min(tokens):,.0f} to "
            f"{max(tokens):,.0f} of them were seen"
        )
    if len({one.trials[0].params.get("seq_len") for one in compared}) > 1:
        said.append("another seq_len holds out other rows and cuts them elsewhere, so such losses are not quite alike")
    return said


def _tokens_seen(candidate: Candidate) -> float | None:
    """Real tokens that it was trained on before the held-out loss was taken, by the window's tokens a step."""
    found = []
    for trial in candidate.trials:
        rate, seconds, steps = (
            trial.metrics.get(key) for key in ("throughput/tokens_per_second", "window/seconds", "window/steps")
        )
        asked = [trial.params.get(f"measure.{key}") for key in ("warmup_steps", "steps")]
        if rate and seconds and steps and None not in asked:
            found.append(rate * seconds / steps * sum(int(number or 0) for number in asked))
    return statistics.median(found) if found else None
