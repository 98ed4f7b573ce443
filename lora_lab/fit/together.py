"""Adapters that train together, as one trial that takes as much memory."""

from collections.abc import Sequence
from dataclasses import replace

from lora_lab.config import TrialConfig


def as_one(members: Sequence[TrialConfig]) -> TrialConfig:
    """Return a trial with the rows of all members and one adapter of all their ranks.

    An adapter of rank r has r rows of A and r columns of B, so those of several members are as large as one of the sum
    of their ranks, with gradients and state. Only the few numbers between A and B are too many: every row has them for
    all ranks here, and for one member's ranks in truth."""
    first = members[0]
    method = replace(first.method, rank=sum(each.method.rank for each in members))
    return replace(first, batch_size=first.batch_size * len(members), method=method, cotrain=[])
