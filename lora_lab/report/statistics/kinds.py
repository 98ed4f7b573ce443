"""Windows and jobs: two kinds of trials, whose figures are never compared or averaged with one another."""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

from lora_lab.store.trials import Group, Trial, groups


class Kind(StrEnum):
    """How a trial trains."""

    window = "window"
    """Warm-up and measured steps."""
    job = "job"
    """A whole training."""


_LENGTHS = ("train.epochs", "train.max_steps")
"""A job has one of these. Versions without jobs have neither."""


def kind_of(trial: Trial) -> Kind:
    """Return a trial's kind."""
    return Kind.job if any(trial.params.get(key, "None") != "None" for key in _LENGTHS) else Kind.window


def groups_alike(trials: Sequence[Trial]) -> list[Group]:
    """Return trials by place and kind, those with most measured trials first."""
    found = [part for group in groups(trials) for part in _by_kind(group)]
    return sorted(found, key=lambda group: -len(group.measured))


def kind_of_group(group: Group) -> Kind:
    """Return the kind that all trials of a group have, as `groups_alike` makes them."""
    return kind_of(next(iter((*group.trials, *(each.trial for each in group.excluded)))))


def _by_kind(group: Group) -> list[Group]:
    parts = [
        replace(
            group,
            trials=tuple(trial for trial in group.trials if kind_of(trial) is kind),
            measured=tuple(trial for trial in group.measured if kind_of(trial) is kind),
            excluded=tuple(each for each in group.excluded if kind_of(each.trial) is kind),
        )
        for kind in Kind
    ]
    return [part for part in parts if part.trials or part.excluded]
