"""The answers of sweeps with repeats=auto, recomputed from their rule and trials."""

from collections.abc import Sequence

from lora_lab.comparison.judge import Run, judge
from lora_lab.comparison.rule import RULE_TAG, Rule
from lora_lab.comparison.words import sentences
from lora_lab.reading import Damaged, parsed, typed
from lora_lab.report.findings import Findings
from lora_lab.store.trials import Sweep, Trial


def answers(findings: Findings) -> list[str]:
    """Return the answers in words; none where no sweep has a rule."""
    trials = {
        trial.run_id: trial
        for found in findings.groups
        for trial in (*found.group.trials, *(excluded.trial for excluded in found.group.excluded))
    }
    return [line for sweep in findings.sweeps for line in answers_of(sweep, list(trials.values()))]


def answers_of(sweep: Sweep, trials: Sequence[Trial]) -> list[str]:
    """Return a sweep's answers in words, from these trials; none where it has no rule."""
    if RULE_TAG not in sweep.tags:
        return []
    try:
        rule = typed(Rule, parsed(sweep.tags[RULE_TAG]))
    except Damaged as damaged:
        return [f"the tag {RULE_TAG} of {sweep.name} cannot be used: {damaged}"]
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
