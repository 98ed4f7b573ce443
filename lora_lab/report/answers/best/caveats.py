"""Caveats of an answer: how certain it is, and what weakens it."""

import math
import statistics
from collections.abc import Sequence

from lora_lab.report.answers.best.candidates import Candidate, Wish
from lora_lab.report.answers.best.ranking import OVER_ROWS, RunnerUp
from lora_lab.report.measures import HOURS, LOSS, VRAM
from lora_lab.report.statistics.kinds import Kind, kind_of
from lora_lab.report.writing.labels import count
from lora_lab.report.writing.numbers import change


def sure(best: Candidate, runners_up: Sequence[RunnerUp]) -> str:
    """Return the certainty of the answer in one line."""
    if not runners_up:
        return "the only configuration left to choose from: nothing to compare it with"
    seen = [runner.estimate.seen for runner in runners_up]
    if None in seen:
        return "one trial each: without an interval the order may be chance; repeat with repeats=5"
    close, better = seen.count(False), sum(runner.ahead and runner.estimate.seen is True for runner in runners_up)
    parts = [f"no significant difference between the best and {close} of {len(seen)} others" if close else ""]
    parts += [f"{better} of {len(seen)} others are better in the blocks shared with the best" if better else ""]
    if not close and not better:
        by_rows = any(runner.how == OVER_ROWS for runner in runners_up)
        lone = not by_rows and any(len(one.trials) == 1 for one in (best, *(runner.candidate for runner in runners_up)))
        borrowed = "; for single trials the noise of the repeated ones is used" if lone else ""
        parts = [f"significantly better than each of {count(len(seen), 'other')} (separate 95 % intervals{borrowed})"]
    return "; ".join(filter(None, parts))


def remarks(best: Candidate, runners_up: Sequence[RunnerUp], wish: Wish) -> list[str]:
    """Return what weakens the answer, and alternatives."""
    said = [*_of_few_trials(best, runners_up, wish), *_of_figures(best)]
    if len({one.limit_gib for one in (best, *(runner.candidate for runner in runners_up))}) > 1:
        said.append(
            "some configurations ran under a memory limit (see labels); the allocator behaves differently under one, "
            "which may explain part of a difference"
        )
    return [*said, *_of_ties(best, runners_up), *_of_loss(best, runners_up, wish)]


def _of_few_trials(best: Candidate, runners_up: Sequence[RunnerUp], wish: Wish) -> list[str]:
    measure = wish.objective
    single = best.figures[measure.name].n == 1
    said = []
    if single:
        said.append("its figure comes from a single trial: run it again (repeats=5) before relying on it")
        repeated = [runner for runner in runners_up if runner.candidate.figures[measure.name].n > 1]
        said += [f"of those with repeats {repeated[0].candidate.label} is the best"] if repeated else []
    ahead = [runner for runner in runners_up if runner.ahead]
    if ahead:
        lucky = ahead[0].candidate
        n = lucky.figures[measure.name].n
        told = "" if ahead[0].estimate.seen else ", but not significantly"
        said.append(
            f"{lucky.label} looks better ({change(ahead[0].estimate.value, measure)}), from {count(n, 'trial')}{told}: "
            "repeat both (repeats=5) to find out which is better"
        )
    untold = any(runner.estimate.seen is not True for runner in runners_up)
    if runners_up and (single or (untold and measure != VRAM)):  # peaks of repeats agree to a driver's page
        said.append(
            f"selected among {len(runners_up) + 1} by the figures shown, so expect a slightly worse result when it "
            "is run again"
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
            f"measured within an emulated {best.limit_gib:g} GiB of a larger card: speed and power are those of the "
            "larger card; on a card of that size leave vram_limit_gib out"
        )
        before = max((trial.metrics.get("card/used_before_gib", 0.0) for trial in best.trials), default=0.0)
        peak = best.figures.get(VRAM.name)
        if peak is not None and peak.high > best.limit_gib:
            said.append(
                f"of the card's peak, {before:.2f} GiB were in use before it began: the limit does not count them"
            )
    if best.aside:
        said.append(
            f"{count(best.aside, 'trial')} of it under other memory limits were used for what fits, but not for its "
            "figures"
        )
    if best.trials[0].params.get("model.weights") == "random":
        said.append("the weights were random: speed, memory and energy are valid, held-out loss is not")
    return said


def _of_ties(best: Candidate, runners_up: Sequence[RunnerUp]) -> list[str]:
    """Return, of those not significantly different from the best, the one with the least memory and the shortest."""
    ties = [runner.candidate for runner in runners_up if runner.estimate.seen is False]
    said = []
    smaller = [one for one in ties if one.needs_gib and best.needs_gib and one.needs_gib < 0.99 * best.needs_gib]
    if smaller and best.needs_gib is not None:
        least = min(smaller, key=lambda one: one.needs_gib or math.inf)
        said.append(
            f"{least.label} has no significant difference and needs {least.needs_gib:.2f} GiB "
            f"instead of {best.needs_gib:.2f}"
        )
    hours = {id(one): one.figures[HOURS.name].median for one in (best, *ties) if HOURS.name in one.figures}
    shorter = [one for one in ties if id(best) in hours and hours.get(id(one), math.inf) < 0.99 * hours[id(best)]]
    if shorter:
        shortest = min(shorter, key=lambda one: hours[id(one)])
        said.append(
            f"{shortest.label} has no significant difference and takes {HOURS.write(hours[id(shortest)])} instead of "
            f"{HOURS.form.format(hours[id(best)])}"
        )
    return said


def _of_loss(best: Candidate, runners_up: Sequence[RunnerUp], wish: Wish) -> list[str]:
    """Return why held-out losses of different configurations are not comparable, if they were compared."""
    if wish.objective != LOSS and wish.max_loss_increase is None:
        return []
    compared = [best, *(runner.candidate for runner in runners_up)]
    tokens = [seen for one in compared if (seen := _tokens_seen(one)) is not None]
    said = []
    if any(runner.how == OVER_ROWS for runner in runners_up):
        said.append("intervals are over the held-out rows: what another seed would change is not in them")
    if tokens and max(tokens) > 1.02 * min(tokens):
        said.append(
            f"held-out losses were taken after equal steps, not equal tokens: {min(tokens):,.0f} to "
            f"{max(tokens):,.0f} tokens were trained on"
        )
    if len({one.trials[0].params.get("seq_len") for one in compared}) > 1:
        said.append("another seq_len holds out other rows and cuts them elsewhere, so such losses are not quite alike")
    return said


def _tokens_seen(candidate: Candidate) -> float | None:
    """Return the real tokens that it was trained on before its held-out loss was taken, by those per measured step.

    None for jobs, whose lengths are part of what is chosen."""
    if kind_of(candidate.trials[0]) is Kind.job:
        return None
    found = []
    for trial in candidate.trials:
        rate, seconds, steps = (
            trial.metrics.get(key) for key in ("throughput/tokens_per_second", "window/seconds", "window/steps")
        )
        asked = [trial.params.get(f"measure.{key}") for key in ("warmup_steps", "steps")]
        if rate and seconds and steps and None not in asked:
            found.append(rate * seconds / steps * sum(int(number or 0) for number in asked))
    return statistics.median(found) if found else None
