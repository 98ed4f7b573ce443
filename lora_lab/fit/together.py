"""Adapters that train together, as one trial that takes as much memory, and what it does not have."""

from collections.abc import Sequence
from dataclasses import replace

from lora_lab.config import TrialConfig
from lora_lab.fit.shapes import shapes_of
from lora_lab.fit.weights import adapter_sizes
from lora_lab.options import DType


def as_one(members: Sequence[TrialConfig]) -> TrialConfig:
    """Return a trial with the rows of all members and one adapter of all their ranks.

    An adapter of rank r has r rows of A and r columns of B, so those of several members are as large as one of the sum
    of their ranks, with gradients and state. The numbers between A and B are too many: every row has them for all
    ranks here, and for one member's ranks in truth. Zeros that fill up lower ranks are missing, see `filled`."""
    first = members[0]
    method = replace(first.method, rank=sum(each.method.rank for each in members))
    return replace(first, batch_size=first.batch_size * len(members), method=method, cotrain=[])


def filled(members: Sequence[TrialConfig]) -> int:
    """Return the bytes of the zeros that fill up adapters to the highest rank. All layers keep them until the backward,
    in the format of products (worker/members.py).

    Raises: InvalidInput where the model's shapes are not known."""
    first, ranks = members[0], [each.method.rank for each in members]
    missing = len(ranks) * max(ranks) - sum(ranks)
    if not missing:
        return 0
    shapes = shapes_of(first.model)
    a_rank = shapes.layers * sum(adapter_sizes(replace(first.method, rank=1), shapes))
    return missing * a_rank * (4 if first.precision.dtype is DType.fp32 else 2)
