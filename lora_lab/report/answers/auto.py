"""The answers of sweeps with repeats=auto, recomputed from their rule and trials."""

from collections.abc import Sequence

from lora_lab.comparison.judge import Run, judge
from lora_lab.comparison.rule import RULE_TAG, Rule
from lora_lab.comparison.words import sentences
from lora_lab.reading import Damaged, parsed, typed
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.trials import Sweep, Trial

Judged = frozenset[tuple[str, str, str]]
"""Contrasts that a rule answers: name of the factor, and both levels in either order."""


def answers_of(sweep: Sweep, trials: Sequence[Trial]) -> list[str]:
    """Return a sweep's answers in words, from these trials; none where it has no rule."""
    try:
        rule = _rule(sweep)
    except Damaged as damaged:
        return [f"the tag {RULE_TAG} of {sweep.name} cannot be used: {damaged}"]
    if rule is None:
        return []
    runs = [
        Run(
            block=trial.repeat,
            point=trial.tags.get("point", ""),
            name=trial.name.removesuffix(f" #{trial.repeat + 1}"),
            outcome=trial.outcome,
            reason=trial.tags.get("reason", ""),
            tags=trial.tags,
            metrics=trial.metrics,
        )
        for trial in trials
        if trial.sweep == sweep.run_id
    ]
    return sentences(rule, judge(rule, runs))


def judged_contrasts(sweeps: Sequence[Sweep], trials: Sequence[Trial], factors: Sequence[Factor]) -> Judged:
    """Return which changes of one factor the sweeps' rules answer."""
    found: set[tuple[str, str, str]] = set()
    for sweep in sweeps:
        try:
            rule = _rule(sweep)
        except Damaged:  # answers_of says so
            continue
        for contrast in rule.contrasts if rule else ():
            for factor in (each for each in factors if contrast.key in each.keys):
                level = {trial.tags.get("point"): factor.level(trial) for trial in trials}
                for points in zip(contrast.over_points, contrast.of_points, strict=True):
                    if set(points) <= level.keys():
                        over, of = (level[point] for point in points)
                        found |= {(factor.name, of, over), (factor.name, over, of)}
    return frozenset(found)


def _rule(sweep: Sweep) -> Rule | None:
    """Return the sweep's rule; None where it has none.

    Raises: Damaged."""
    return typed(Rule, parsed(sweep.tags[RULE_TAG])) if RULE_TAG in sweep.tags else None
