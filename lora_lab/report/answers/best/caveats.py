"""How sure an answer is, and what makes it weaker, in words."""

import math
import statistics
from collections.abc import Sequence

from lora_lab.report.answers.best.candidates import Candidate, Wish
from lora_lab.report.answers.best.ranking import RunnerUp
from lora_lab.report.measures import LOSS, VRAM
from lora_lab.report.writing.labels import count
from lora_lab.report.writing.numbers import change


def sure(best: Candidate, runners_up: Sequence[RunnerUp]) -> str:
    """In one line."""
    if not runners_up:
        return "the only configuration left to choose from: nothing to compare it with"
    seen = [runner.estimate.seen for runner in runners_up]
    if None in seen:
        return "one trial each: no interval, so nobody can say whether the order is chance; repeat with repeats=3"
    close, better = seen.count(False), sum(runner.ahead and runner.estimate.seen is True for runner in runners_up)
    parts = [f"{close} of {len(seen)} others cannot be told from the best" if close else ""]
    parts += [f"{better} of {len(seen)} others are better in the blocks that both ran in" if better else ""]
    if not close and not better:
        lone = any(len(one.trials) == 1 for one in (best, *(runner.candidate for runner in runners_up)))
        borrowed = "; single trials by the noise of those that have repeats" if lone else ""
        parts = [f"told apart from each of {count(len(seen), 'other')} (95 % intervals, one by one{borrowed})"]
    return "; ".join(filter(None, parts))


def remarks(best: Candidate, runners_up: Sequence[RunnerUp], wish: Wish) -> list[str]:
    """What makes the answer weaker; what else might be taken."""
    said = [*_of_few_trials(best, runners_up, wish), *_of_figures(best)]
    if len({one.limit_gib for one in (best, *(runner.candidate for runner in runners_up))}) > 1:
        said.append(
            "not all were measured with the same memory at hand (labels say which within how much); under a limit "
            "torch's allocator works otherwise, so part of a difference may be that"
        )
    return [*said, *_of_ties(best, runners_up), *_of_loss(best, runners_up, wish)]


def _of_few_trials(best: Candidate, runners_up: Sequence[RunnerUp], wish: Wish) -> list[str]:
    measure = wish.objective
    single = best.figures[measure.name].n == 1
    said = []
    if single:
        said.append("its figure is of a single trial: run it again (repeats=3) before relying on it")
        repeated = [runner for runner in runners_up if runner.candidate.figures[measure.name].n > 1]
        said += [f"of those with repeats {repeated[0].candidate.label} is the best"] if repeated else []
    ahead = [runner for runner in runners_up if runner.ahead]
    if ahead:
        lucky = ahead[0].candidate
        n = lucky.figures[measure.name].n
        told = "" if ahead[0].estimate.seen else " and cannot be told from it"
        said.append(
            f"{lucky.label} looks better ({change(ahead[0].estimate.value, measure)}), by {count(n, 'trial')}{told}: "
            "repeats of both (repeats=3) would say which is"
        )
    untold = any(runner.estimate.seen is not True for runner in runners_up)
    if runners_up and (single or (untold and measure != VRAM)):  # peaks of repeats agree to a driver's page
        said.append(
            f"picked among {len(runners_up) + 1} by the very figures that are shown, so expect it to do a little "
            "worse when it is run again"
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
    if best.aside:
        said.append(
            f"{count(best.aside, 'trial')} of it with other memory at hand said what fits, and are not in its figures"
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
