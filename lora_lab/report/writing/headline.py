"""The headline: a question, and its answer in five plain sentences. Figures with their intervals are in the table below
it."""

import itertools
from collections import Counter
from collections.abc import Sequence

from lora_lab.outcome import Outcome
from lora_lab.report.answers.best.command import runnable
from lora_lab.report.answers.pareto import Point
from lora_lab.report.findings import Findings, GroupFindings
from lora_lab.report.measures import HOURS, LOSS, MEASURES, THROUGHPUT, Better, Measure
from lora_lab.report.statistics.blocks import between_cards
from lora_lab.report.statistics.factors import SHAPE, TOKENS, Confounded
from lora_lab.report.statistics.kinds import Kind
from lora_lab.report.writing.effects import Effect, dropped, effects, is_mostly_idle, sentence
from lora_lab.report.writing.labels import count, outcome_text
from lora_lab.report.writing.learnt import best_learnt, front_sentences, is_compared, no_worse, ordered, trade
from lora_lab.report.writing.numbers import change
from lora_lab.report.writing.point_names import point_text
from lora_lab.store.trials import Trial

GPU_WORK = "gpu_work"
"""The name of the measure that says how long the GPU itself works, where it is among the measures."""
_REASONS = 5
"""How many reasons have a line, where no trial has figures."""
_EFFECTS = 2
"""How many effects have a sentence. The others are in the tables."""


def question(findings: Findings) -> str:
    """Return the question that the report answers, as its title."""
    if best_point(findings.groups[0]) is None:
        return "Why did no trial give figures?"
    configurations = len(findings.groups[0].points)
    if configurations == 1:
        return "What does this configuration take?"
    which = f"hich of {configurations} configurations is best"
    if findings.verdicts:
        studies = " and ".join(study.id for study, _ in findings.verdicts)
        return f"Do the claims of {studies} hold, and w{which}?"
    return f"W{which}?"


def sentences(findings: Findings) -> tuple[str, ...]:
    """Return at most five sentences on the machine with most trials: what was found, for whom it holds, what to do.

    Where no trial has figures: the reasons."""
    main = findings.groups[0]
    if best_point(main) is None:
        return _nothing(main)
    made = effects(main)
    told = [effect for effect in made if not effect.is_judged]
    learnt = _on_quality(main)
    told = told[: _EFFECTS - len(learnt)]
    mattered = [sentence(effect, most_repeats(main)) for effect in told]
    if not made and len(main.points) > 1:
        mattered = [_why_no_effect(main)]
    is_judged = bool(findings.answers)  # the answer of repeats=auto is the advice, and may not be contradicted
    found = [_upper_first(text) for text in (_on_best(main, is_judged), *learnt, *mattered)]
    holds = _holds(main, [effect for effect in made if effect.is_judged or effect in told])
    return tuple(text for text in (*found, holds, "" if is_judged else _to_do(main)) if text)


def notes(findings: Findings) -> tuple[str, ...]:
    """Return what a reader must know besides: what did not run, what is not compared, and other machines."""
    main = findings.groups[0]
    said = [
        _not_run(findings),
        _skipped(findings),
        _ended(main),
        _cards(main),
        dropped(main),
        trade(main),
        *front_sentences(main)[len(_on_quality(main)) :],
    ]
    if findings.answers:
        said.append("Only the answer at the top counts the looks of repeats=auto; other 95 % intervals may miss more.")
    others = len({found.group.place for found in findings.groups}) - 1
    if others:
        said.append(f"{count(others, 'other machine')} or version reported separately, not averaged in.")
    if any(found.kind is not main.kind for found in findings.groups):
        said.append("Windows and jobs are reported separately: their figures are never compared with one another.")
    return tuple(text for text in said if text)


def _cards(found: GroupFindings) -> str:
    """Say what becomes of the differences between the cards of a sweep whose trials ran side by side."""
    measured = found.group.measured
    cards = {trial.card for trial in measured}
    if len(cards) < 2:
        return ""
    apart = [(measure, value) for measure in MEASURES if (value := between_cards(measured, measure)) is not None]
    if not apart:
        return (
            f"The trials ran on {len(cards)} cards of one kind. Changes between points on different cards also show "
            "what these cards differ by; with more repeats or points that can be told, and is taken out."
        )
    told = " and ".join(f"{change(value, measure, signed=False)} in {measure.title}" for measure, value in apart)
    return (
        f"The trials ran on {len(cards)} cards of one kind, which differ by {told}. That is taken out of the changes."
    )


def confounded(found: GroupFindings) -> list[Confounded]:
    """Return settings that cannot be separated, without the parts of the shape: those are one thing in every grid."""
    return [each for each in found.design.confounded if not set(each.names) <= {*SHAPE, TOKENS}]


def command(findings: Findings) -> str:
    """Return the command that runs the best configuration; "" where there is none."""
    main = findings.groups[0]
    best = best_point(main)
    trials = [] if best is None else [trial for trial in best.trials if trial in main.group.measured]
    return runnable(trials[-1], main.group.measured) if trials else ""


def best_point(found: GroupFindings) -> Point | None:
    """Return the point that learnt best among jobs whose losses are compared; else the fastest."""
    return best_learnt(found)[0] if is_about_quality(found) else fastest_point(found)


def fastest_point(found: GroupFindings) -> Point | None:
    """Return the point of the shortest job or of the highest median throughput; without any, one with figures."""
    for measure in (HOURS, THROUGHPUT) if found.kind is Kind.job else (THROUGHPUT,):
        if rated := [point for point in found.points if measure.name in point.figures]:
            return _best(rated, measure)
    return next((point for point in found.points if point.figures), None)


def is_about_quality(found: GroupFindings) -> bool:
    """Return whether what was learnt comes first: a job is trained for its model, a window for its speed."""
    return found.kind is Kind.job and is_compared(found)


def most_repeats(found: GroupFindings) -> int:
    """Return how often the most repeated point was measured."""
    measured = {trial.run_id for trial in found.group.measured}
    return max((sum(trial.run_id in measured for trial in point.trials) for point in found.points), default=0)


def _on_best(found: GroupFindings, is_judged: bool) -> str:
    best = best_point(found)
    assert best is not None
    name, device = point_text(best, found), found.group.place.device
    if is_about_quality(found):
        loss, over = LOSS.write(best_learnt(found)[1].loss), count(len(ordered(found)), "configuration")
        if best is ordered(found)[0][0]:
            return f"{name} had the lowest held-out loss of {over} on {device}, {loss}; {no_worse(found)}."
        return (
            f"{name} learnt best of {over} on {device}: a held-out loss of {loss}. Lower ones took longer, within the "
            "noise of the rows."
        )
    if len(found.points) == 1:
        figures = [m.write(best.figures[m.name][0]) for m in MEASURES if m.name in best.figures]
        return f"{name} reached {', '.join(figures)} on {device}."
    if THROUGHPUT.name not in best.figures:
        return f"No configuration has a throughput on {device}."
    rated, rate = _rated(found), THROUGHPUT.write(best.figures[THROUGHPUT.name][0])
    if rated == 1:
        return f"Only {name} of {len(found.points)} configurations has a throughput on {device}: {rate}."
    if found.kind is Kind.job and HOURS.name in best.figures:
        took = HOURS.write(best.figures[HOURS.name][0])
        return f"{name} was the shortest job of {count(len(found.points), 'configuration')} on {device}: {took}."
    first = "had the highest median" if is_judged else "was the fastest"
    return f"{name} {first} of {count(rated, 'configuration')} on {device}, with {rate}."


def _on_quality(found: GroupFindings) -> list[str]:
    """Return the first sentence on quality and its cost, of jobs: there it is as much of the answer as speed."""
    return front_sentences(found)[:1] if found.kind is Kind.job and found.quality else []


def _rated(found: GroupFindings) -> int:
    """Return how many points have a throughput."""
    return sum(THROUGHPUT.name in point.figures for point in found.points)


def _why_no_effect(found: GroupFindings) -> str:
    """Return why no effect on the throughput can be named; "" where the note on stand-ins says it."""
    if dropped(found):
        return ""
    pairs = itertools.combinations([list(point.levels.values()) for point in found.points], 2)
    if any(sum(a != b for a, b in zip(one, other, strict=True)) == 1 for one, other in pairs):
        why = "no repeat has figures on both sides of a change of one setting"
    else:
        why = "no two trials differ in only one setting"
    return f"No setting's effect on the throughput can be named: {why}."


def _holds(found: GroupFindings, named: Sequence[Effect]) -> str:
    """Return for whom it holds, by what the trials waited for, and by what the named effects consist of."""
    regimes = Counter(trial.regime for trial in found.group.measured)
    trials = regimes.total()
    if set(regimes) <= {"not known"}:
        if any("device.cpu" in trial.tags for trial in found.group.measured):
            return "It ran on a CPU, which says little about a GPU."
        return "No sensor could show whether the GPU or its host was the limit, so it holds for this machine only."
    waited = regimes["host-bound"]
    if waited:
        share = "all" if waited == trials else f"{waited} of {trials}"
        carries = any(each.measure.name == GPU_WORK for each in found.contrasts)
        what = "; the GPU work below carries over to it" if carries else ""
        return (
            f"In {share} trials the GPU waited for Python most of the time (host-bound), so another host may change "
            f"the order{what}."
        )
    if idle := [effect for effect in named if is_mostly_idle(effect)]:
        which = " and ".join(f"{effect.of} and {effect.over}" for effect in idle)
        return (
            f"The GPU was busy most of the time, but most of what differs between {which} is idle time, which another "
            "host may not have."
        )
    return "The GPU was busy most of the time, so expect a similar order on other hosts with this GPU."


def _to_do(found: GroupFindings) -> str:
    best = best_point(found)
    assert best is not None
    name = point_text(best, found)
    if len(found.points) > 1 and _rated(found) < 2:
        return ""
    if most_repeats(found) < 2:
        what = "the order" if len(found.points) > 1 else "the figures"
        return f"Nothing was repeated: run it with repeats=5 before you rely on {what}."
    if len(found.points) == 1:
        return "There is nothing to compare it with yet: vary a setting, as in batch_size=1,2."
    if is_about_quality(found):
        return f"Use {name} if the held-out loss counts most."
    if found.as_fast:
        others = count(found.as_fast, "other configuration")
        verb = "is" if found.as_fast == 1 else "are"
        return f"Use {name} if speed counts; {others} {verb} as fast as far as this can show."
    return f"Use {name} if speed counts: every other configuration was slower beyond noise."


def _nothing(found: GroupFindings) -> tuple[str, ...]:
    trials = {trial.run_id: trial for trial in found.group.trials}
    trials |= {each.trial.run_id: each.trial for each in found.group.excluded}
    reasons = Counter(f"{trial.name}: {_ended_by(trial)}" for trial in trials.values())
    said = [f"No trial finished with figures that can be compared on {found.group.place.device}."]
    for reason, number in reasons.most_common(_REASONS):
        times = f" ({number} times)" if number > 1 else ""
        said.append(f"{reason.rstrip('.')}{times}.")
    if len(reasons) > _REASONS:
        said.append(f"And {len(reasons) - _REASONS} more: add --full.")
    if any(trial.outcome == Outcome.out_of_memory.value for trial in found.group.trials):
        said.append("To need less memory, try gradient_checkpointing=full, a smaller batch_size or a shorter seq_len.")
    return tuple(said)


def _ended_by(trial: Trial) -> str:
    """Return how a trial without figures ended, and why."""
    if trial.finished and trial.tags.get("validity") == "invalid":
        return f"invalid: {trial.tags.get('validity_reasons', 'no reason kept')}"
    if trial.finished:
        return "finished without figures that can be compared"
    reason = trial.tags.get("reason", "")
    return outcome_text(trial.outcome) + (f": {reason}" if reason else "")


def _not_run(findings: Findings) -> str:
    """Return how many planned trials have not been run, so that a part is not mistaken for the whole. All repeats of
    a point that was skipped are left out."""
    over = Counter(trial.sweep for found in findings.groups for trial in found.group.trials)
    skipped = Counter(sweep for sweep, _ in _predicted(findings))
    to_run = {
        sweep.run_id: max(0, (sweep.planned or 0) - skipped[sweep.run_id] * sweep.repeats) for sweep in findings.sweeps
    }
    planned, done = sum(to_run.values()), sum(min(over[run_id], number) for run_id, number in to_run.items())
    if done == planned:
        return ""
    return f"Only {done} of the {planned} planned trials have been run; resume=true runs the rest."


def _skipped(findings: Findings) -> str:
    """Return how many points plan=fits has skipped."""
    number = len(_predicted(findings))
    if not number:
        return ""
    return f"{count(number, 'point')} skipped, because an estimate says that the memory is too small: not measured."


def _predicted(findings: Findings) -> set[tuple[str | None, str]]:
    """Return the sweep and the point of each trial that was skipped and not run since."""
    groups = [found.group for found in findings.groups]
    ran = {_place_in_sweep(trial) for group in groups for trial in group.trials}
    left_out = [each.trial for group in groups for each in group.excluded]
    predicted = Outcome.predicted_out_of_memory.value
    return {_place_in_sweep(trial) for trial in left_out if trial.outcome == predicted} - ran


def _place_in_sweep(trial: Trial) -> tuple[str | None, str]:
    return trial.sweep, trial.tags.get("point", trial.run_id)


def _ended(found: GroupFindings) -> str:
    ended = Counter(outcome for point in found.points for outcome in point.outcomes if outcome != "finished")
    if not ended or not any(point.figures for point in found.points):
        return ""
    told = ", ".join(f"{number} {outcome_text(outcome)}" for outcome, number in ended.items())
    return f"Of {len(found.points)} configurations not all ran to the end: {told}."


def _best(among: Sequence[Point], measure: Measure) -> Point:
    choose = max if measure.better is Better.higher else min
    return choose(among, key=lambda point: point.figures[measure.name][0])


def _upper_first(text: str) -> str:
    """Return a sentence with a capital, unless it begins with a setting's own name."""
    first = text.split(" ", 1)[0]
    return text[0].upper() + text[1:] if first.isalpha() and first in ("no", "in") else text
