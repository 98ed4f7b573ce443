"""Run a sweep with repeats=auto: block after block, until its rule has an answer or the budget is used up.

A block holds each point once, back to back in random order. A block that a kill cut off is not continued, because its
pairs would no longer be back to back: the next start begins a new one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_lab.comparison.judge import Answer, Run, Verdict, judge
from lora_lab.comparison.rule import Rule
from lora_lab.comparison.words import sentences
from lora_lab.store.sweep_folder import Plan, Planned, SweepFolder
from lora_lab.sweep.plan import GridPoint, plan_block


@dataclass(frozen=True, slots=True)
class Judged:
    """What a sweep's blocks say, and what they took."""

    rule: Rule
    verdicts: tuple[Verdict, ...]
    used_seconds: float
    block_seconds: float | None
    """On average; None before the first block."""

    @property
    def settled(self) -> bool:
        """Return whether nothing is open."""
        return all(verdict.answer is not Answer.unsettled for verdict in self.verdicts)

    @property
    def comparable(self) -> bool:
        """Return whether every contrast could be measured."""
        return all(verdict.answer is not Answer.incomparable for verdict in self.verdicts)

    @property
    def lines(self) -> list[str]:
        """Return the verdicts in words."""
        block = None if self.block_seconds is None else self.block_seconds / 60
        return sentences(self.rule, self.verdicts, self.used_seconds / 60, block)


def run_blocks(folder: SweepFolder, points: Sequence[GridPoint], launch: Callable[[list[Planned]], int]) -> int:
    """Run blocks until the rule in the folder's plan is satisfied. Return the exit code of the last launch.

    Args:
        launch: runs trials and returns an exit code; anything but 0 ends the sweep."""
    begun, before, code = time.monotonic(), spent(folder, folder.read()), 0
    while code == 0:
        plan = folder.read()
        plan.spent_seconds = before + time.monotonic() - begun
        now = judged(folder, plan)
        if now.settled or now.used_seconds + (now.block_seconds or 0.0) > now.rule.budget_minutes * 60:
            break
        block = next_block(folder, plan, points)
        folder.write(plan)
        code = launch(block)
        if code == 0 and any(folder.attempt(trial) is None for trial in block):
            code = 1  # a trial was refused, and has said why: the next would be as well
    plan = folder.read()
    plan.spent_seconds = before + time.monotonic() - begun
    plan.record.tags["verdict"] = "\n".join(judged(folder, plan).lines)
    folder.write(plan)
    return code


def judged(folder: SweepFolder, plan: Plan) -> Judged:
    """Judge a sweep by the trials in its folder.

    Raises: ValueError when it has no rule."""
    if plan.rule is None:
        raise ValueError(f"{folder.path} holds a sweep without repeats=auto")
    used = spent(folder, plan)
    blocks = len({trial.repeat for trial in plan.trials if folder.attempt(trial) is not None})
    return Judged(plan.rule, judge(plan.rule, _runs(folder, plan)), used, used / blocks if blocks else None)


def next_block(folder: SweepFolder, plan: Plan, points: Sequence[GridPoint]) -> list[Planned]:
    """Return the block to run next. One that no start has begun is taken; else a new one is added to the plan."""
    last = max(trial.repeat for trial in plan.trials)
    block = [trial for trial in plan.trials if trial.repeat == last]
    if any(folder.begun(trial) for trial in block):
        block = plan_block(points, last + 1, points[0].config.seed, len(plan.trials))
        plan.trials += block
    return block


def spent(folder: SweepFolder, plan: Plan) -> float:
    """Return the seconds that the sweep has used: what its starts noted, or its trials took, if a kill hid that."""
    attempts = [folder.attempt(trial) for trial in plan.trials]
    return max(plan.spent_seconds, sum(attempt.seconds for attempt in attempts if attempt is not None))


def _runs(folder: SweepFolder, plan: Plan) -> list[Run]:
    found = []
    for trial in plan.trials:
        attempt = folder.attempt(trial)
        if attempt is not None:
            found.append(
                Run(
                    block=trial.repeat,
                    point=trial.point,
                    name=trial.label,
                    outcome=attempt.outcome,
                    reason=attempt.reason,
                    tags=attempt.tags,
                    metrics=attempt.metrics,
                )
            )
    return found
