"""Plan a job: how many steps it takes, when it evaluates and when it saves."""

import math
from dataclasses import dataclass

from lora_lab.config import InvalidInput, TrialConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """The length of a job in optimizer steps. Its last step is evaluated, and saved where any is."""

    steps: int
    steps_per_epoch: int
    warmup_steps: int
    evaluate_every: float
    """In steps; not a whole number where a part of an epoch is not."""
    checkpoint_every: float
    saves: bool
    """Whether checkpoints are saved at all."""
    rows_left_out: int
    """Rows that an epoch leaves out, other rows in each: less than a micro-batch of all workers."""

    def evaluates_after(self, step: int) -> bool:
        """Return whether the held-out rows are evaluated after this step, counted from 1."""
        return _is_due(step, self.evaluate_every)

    def saves_after(self, step: int) -> bool:
        """Return whether a checkpoint is saved after this step, counted from 1."""
        return self.saves and _is_due(step, self.checkpoint_every)


def _is_due(step: int, every: float) -> bool:
    """Return whether a multiple of `every` lies after the step before and not after this one. So what comes after a
    part of an epoch comes at the end of each epoch too, whatever its number of steps."""
    rounding = 1e-6
    return math.floor(step / every + rounding) > math.floor((step - 1) / every + rounding)


def plan_job(config: TrialConfig, rows: int) -> JobPlan:
    """Plan the job of a config with `train.epochs` or `train.max_steps`.

    Args:
        rows: of the training split, packed where they are.

    Raises: InvalidInput when its warm-up, evaluations or checkpoints do not fit into its steps.
    """
    train = config.train
    # as Trainer counts with drop_last: the last step of an epoch may have fewer micro-batches
    at_once = config.batch_size * config.placement.world_size
    steps_per_epoch = math.ceil(rows // at_once / config.grad_accum_steps)
    steps = train.max_steps or _whole((train.epochs or 0) * steps_per_epoch)
    warmup = int(train.warmup) if train.warmup >= 1 else min(_whole(train.warmup * steps), steps - 1)
    plan = JobPlan(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup,
        evaluate_every=_in_steps(train.eval_every, steps_per_epoch),
        checkpoint_every=_in_steps(train.checkpoint_every, steps_per_epoch),
        saves=train.keep_checkpoints > 0,
        rows_left_out=rows % at_once,
    )
    faults = _faults(config, plan)
    if faults:
        raise InvalidInput(*faults)
    return plan


def _whole(steps: float) -> int:
    """Round steps up, but not for what arithmetic with fractions adds: 0.07 of 100 is 7."""
    return math.ceil(steps - 1e-6)


def _in_steps(every: float, steps_per_epoch: int) -> float:
    """Convert a part of an epoch, or above 1 a number of steps, into steps. An epoch of one step has no parts."""
    in_steps = every if every > 1 else every * steps_per_epoch
    return max(1.0, in_steps) if steps_per_epoch == 1 else in_steps


def _faults(config: TrialConfig, plan: JobPlan) -> list[str]:
    train, found = config.train, []
    length = f"the job has {plan.steps} steps ({plan.steps_per_epoch} in an epoch)"
    if plan.warmup_steps >= plan.steps:
        found.append(
            f"train.warmup={train.warmup:g} is {plan.warmup_steps} steps, and {length}: the learning rate would never "
            f"reach learning_rate={config.learning_rate:g}. Use a longer job, or a shorter warm-up: train.warmup=0 has "
            "none."
        )
    for setting, every, what in (
        ("eval_every", plan.evaluate_every, "evaluations"),
        ("checkpoint_every", plan.checkpoint_every, "checkpoints"),
    ):
        if every < 1:
            found.append(
                f"train.{setting}={getattr(train, setting):g} of an epoch asks for more {what} than steps: {length}. "
                f"Use train.{setting}=1 for one in each epoch."
            )
    return found
