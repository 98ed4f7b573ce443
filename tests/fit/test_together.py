"""The memory of adapters that train together, next to what a card took."""

import pytest

from benchmarks.compose import compose
from benchmarks.cotrain import CELLS
from benchmarks.reports import stored
from lora_lab.config import TrialConfig
from lora_lab.fit.estimate import GIB, estimate
from lora_lab.fit.shapes import shapes_of
from lora_lab.fit.together import as_one, filled
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.trial.estimated import doubt_of_job, note_estimate


def members(count: int, *more: str) -> list[TrialConfig]:
    return [compose([*CELLS["1x512"], f"learning_rate={1 + number}e-4", *more]) for number in range(count)]


def said(config: TrialConfig) -> float:
    return estimate(config, shapes_of(config.model)).allocated / GIB


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_what_eight_members_take_is_what_a_card_took(engine: str) -> None:
    took = stored("h200/cotrain")["cells"]["1x512"][f"{engine} together"]["GiB"]
    assert 1.0 <= said(as_one(members(8, f"engine={engine}"))) / took < 1.05


def test_one_member_is_itself_and_ranks_are_added() -> None:
    [alone] = members(1, "batch_size=2")
    assert said(as_one([alone])) == said(alone)
    others = [*members(1, "method.rank=4", "batch_size=2"), *members(1, "method.rank=12", "batch_size=2")]
    whole = as_one(others)
    assert (whole.method.rank, whole.batch_size) == (16, 4)
    assert [each.method.rank for each in others] == [4, 12]


def test_lower_ranks_are_filled_up_to_the_highest() -> None:
    """What autograd keeps of the layers' own code is as large as adapters of the highest rank in 16 bit."""
    assert filled(members(8)) == 0
    own = [*members(1, "method.rank=8"), *members(1, "method.rank=24")]
    shapes = shapes_of(own[0].model)
    a_rank = shapes.layers * sum(linear.inputs + linear.outputs for linear in shapes.linears)
    assert filled(own) == 2 * (24 - 8) * a_rank
    seen = HostFacts(card_bytes=80 * GIB, members=2)
    note_estimate(seen, as_one(own), own)
    assert seen.estimate is not None
    assert seen.estimate.allocated == estimate(as_one(own), shapes).allocated + filled(own)


@pytest.mark.parametrize(
    ("card", "more", "says"),
    [
        (8, (), ("8 adapters do not fit", "gradient_checkpointing=full")),
        (15, (), ("8 adapters may not fit", "gradient_checkpointing=full")),
        (4, ("gradient_checkpointing=full",), ("fewer values",)),
        (8, ("plan=all",), ()),
        (80, (), ()),
    ],
)
def test_a_job_that_may_not_fit_its_card_says_so_before_it_runs(
    card: int, more: tuple[str, ...], says: tuple[str, ...]
) -> None:
    each = members(8, *more)
    whole = as_one(each)
    seen = HostFacts(card_bytes=card * GIB, members=8)
    note_estimate(seen, whole, each)
    assert seen.estimate is not None
    assert seen.estimate.slots == 512, "a member's own rows, which its steps are compared with"
    found = doubt_of_job(whole, seen)
    assert all(part in found for part in says) if says else found == ""
    assert ("gradient_checkpointing" in found) == ("gradient_checkpointing=full" in says)
