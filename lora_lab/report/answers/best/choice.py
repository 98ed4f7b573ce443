"""Which of the measured configurations to use: the best by one measure of those that fit, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.config import InvalidInput
from lora_lab.report.answers.best.candidates import Candidate, Wish, candidates, in_time, within
from lora_lab.report.answers.best.caveats import remarks, sure
from lora_lab.report.answers.best.cohort import Subject, others, subjects
from lora_lab.report.answers.best.ranking import RunnerUp, ranked
from lora_lab.report.measures import HOURS, LOSS, VRAM
from lora_lab.report.statistics.heldout import loss_over
from lora_lab.report.writing.labels import count
from lora_lab.store.trials import Trial


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
    """When nothing fits into memory: what needs least."""
    left_out: tuple[str, ...]
    """What was no candidate, and why."""
    sure: str
    """How sure it is, in words."""
    remarks: tuple[str, ...]
    others: tuple[str, ...]
    """Other cohorts, and how to choose them."""
    shortest: Candidate | None = None
    """When nothing that fits is short enough: what takes least time."""
    another_card: bool = False
    """Whether it is about a card that the trials did not run on."""
    is_largest_model: bool = False
    """Whether no larger model fits, of several that were measured."""


def choose(trials: Sequence[Trial], wish: Wish) -> Choice:
    """Choose the best configuration.

    Windows and jobs, models, data, lengths of the window, cards, versions and code are never mixed: the newest trial
    determines kind, model, data, window and card, and of the environments with these the one with most measured trials
    is used.

    Raises: InvalidInput when nothing is measured, or the measurements cannot answer the question."""
    found = subjects(trials, wish.model, wish.card, wish.kind)
    subject = found[0]
    _check_answerable(subject, wish)
    found_here, left_out = candidates(subject, wish)
    _check_memory_known(subject, found_here, wish)
    fitting, too_large = within(found_here, wish)
    short, too_long = in_time(fitting, wish)
    left_out += too_large + too_long
    rest = tuple(others(found))
    if not short:
        return Choice(
            wish=wish,
            subject=subject,
            best=None,
            runners_up=(),
            least=None if fitting else min(found_here, key=_needs),
            shortest=min(fitting, key=_longest, default=None),
            left_out=tuple(left_out),
            sure="",
            remarks=(),
            others=rest,
        )
    fitting, worse, unsure = _learning(short, wish)
    best, runners_up = ranked(fitting, wish.objective)
    return Choice(
        wish=wish,
        subject=subject,
        best=best,
        runners_up=runners_up,
        least=None,
        left_out=tuple(left_out + worse),
        sure=sure(best, runners_up),
        remarks=tuple(unsure + remarks(best, runners_up, wish)),
        others=rest,
    )


def _needs(one: Candidate) -> tuple[bool, float]:
    """Return a sort key: measured needs first, then lower bounds from trials that ran out of memory."""
    return one.fit is None or one.fit.next_is_bound, one.needs_gib or math.inf


def _longest(one: Candidate) -> float:
    """Return the longest of its jobs, in hours; infinite where none is known."""
    return one.figures[HOURS.name].high if HOURS.name in one.figures else math.inf


def _check_answerable(subject: Subject, wish: Wish) -> None:
    measured = subject.measured
    if wish.max_loss_increase is not None and all(LOSS.of(trial) is None for trial in measured):
        raise InvalidInput(
            f"--max-loss-increase cannot be applied here: {LOSS.why_absent(measured[-1])}. {subject.text}: leave the "
            "option out, or run trials with pretrained weights and measure.eval_rows above 0."
        )
    if all(wish.objective.of(trial) is None for trial in measured):
        raise InvalidInput(
            f"no trial has {wish.objective.title}: {wish.objective.why_absent(measured[-1])}. {subject.text}: choose "
            "another --objective, or other trials with --model, --card or --sweep."
        )


def _check_memory_known(subject: Subject, found: Sequence[Candidate], wish: Wish) -> None:
    if wish.vram_gib is not None and all(one.fit is None for one in found):
        raise InvalidInput(
            f"--vram {wish.vram_gib:g} cannot be applied here: no trial has the card's peak "
            f"({VRAM.why_absent(subject.measured[-1])}). {subject.text}: leave --vram out, or choose trials of a card "
            "with --card NAME."
        )


def _learning(candidates: Sequence[Candidate], wish: Wish) -> tuple[list[Candidate], list[str], list[str]]:
    """Return the candidates whose held-out loss is low enough, what was left out, and what is uncertain of the rest.

    A loss is compared with the lowest by the held-out rows that both were evaluated on, where these were kept; else by
    the medians.

    Raises: InvalidInput when none of them has one."""
    if wish.max_loss_increase is None:
        return list(candidates), [], []
    known = [one for one in candidates if LOSS.name in one.figures]
    if not known:
        raise InvalidInput(
            "--max-loss-increase cannot be applied: none of the configurations that fit has a held-out loss. Run them "
            "with measure.eval_rows above 0."
        )
    lowest = min(known, key=lambda one: one.figures[LOSS.name].median)
    least = lowest.figures[LOSS.name].median
    most = least * wish.max_loss_increase
    increases = {id(one): _increase(one, lowest) for one in known}
    kept = [one for one in known if increases[id(one)][0] <= most]
    gone = len(known) - len(kept)
    left_out = [f"{count(gone, 'configuration')} with a held-out loss above {least + most:.4f}"] if gone else []
    unknown = len(candidates) - len(known)
    left_out += [f"{count(unknown, 'configuration')} without a held-out loss"] if unknown else []
    unsure = sum(increases[id(one)][1] > most for one in kept)
    reach = f"{count(unsure, 'configuration')} may lie above that limit of the loss, by the 95 % interval over rows"
    return kept, left_out, [reach] if unsure else []


def _increase(one: Candidate, lowest: Candidate) -> tuple[float, float]:
    """Return the held-out loss over the lowest, and the upper end of its interval; the same twice without one."""
    over = None if one is lowest else loss_over(one.trials, lowest.trials)
    if over is None:
        value = one.figures[LOSS.name].median - lowest.figures[LOSS.name].median
        return value, value
    return over.value, over.value if over.high is None else over.high
