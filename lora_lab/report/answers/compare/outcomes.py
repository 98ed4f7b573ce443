"""How the points of two sides ended."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.outcome import Outcome
from lora_lab.report.statistics.settings import Settings, by_point, labels
from lora_lab.store.trials import Trial

_SAYS_NOTHING = (Outcome.killed.value, Outcome.refused.value, Outcome.predicted_out_of_memory.value)
"""Outcomes that come from outside, or that were only predicted. A crash or a time-out may come from what
changed, so these two count here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeChange:
    """A point that ended differently."""

    label: str
    one: str
    other: str
    worse: bool


def ended(one: Sequence[Trial], other: Sequence[Trial], known: frozenset[str]) -> tuple[list[OutcomeChange], int]:
    """Return points that ended differently, and how many ended the same way."""
    ours, theirs = _by_point(one, known), _by_point(other, known)
    points = list(ours | theirs)
    names = dict(zip(points, labels(points), strict=True))
    changed, alike = [], 0
    for point in (point for point in ours if point in theirs):
        here, there = ours[point], theirs[point]
        finished = Outcome.finished.value
        if set(here) == set(there):
            alike += 1
            continue
        changed.append(
            OutcomeChange(
                label=names[point],
                one=_tally(here),
                other=_tally(there),
                worse=here.count(finished) * len(there) < there.count(finished) * len(here),
            )
        )
    return changed, alike


def _by_point(trials: Sequence[Trial], known: frozenset[str]) -> dict[Settings, list[str]]:
    """Return how each point's trials ended, by their last attempt."""
    found = {}
    for point, told in by_point(sorted(trials, key=lambda trial: trial.started_ms), known).items():
        last = {
            (trial.run_id, 0) if trial.sweep is None else (trial.sweep, trial.repeat): trial.outcome
            for trial in told
            if trial.outcome in {outcome.value for outcome in Outcome} and trial.outcome not in _SAYS_NOTHING
        }
        if last:
            found[point] = sorted(last.values())
    return found


def _tally(outcomes: Sequence[str]) -> str:
    return ", ".join(
        outcome.replace("_", " ") + (f" {outcomes.count(outcome)} of {len(outcomes)}" if len(outcomes) > 1 else "")
        for outcome in dict.fromkeys(outcomes)
    )
