"""The memory of adapters that train together, next to what a card took."""

import pytest

from benchmarks.compose import compose
from benchmarks.cotrain import CELLS
from benchmarks.reports import stored
from lora_lab.config import TrialConfig
from lora_lab.fit.estimate import GIB, estimate
from lora_lab.fit.shapes import shapes_of
from lora_lab.fit.together import as_one
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
    [alone] = members(1)
    assert said(as_one([alone])) == said(alone)
    others = [*members(1, "method.rank=4"), *members(1, "method.rank=12")]
    assert as_one(others).method.rank == 16
    assert said(as_one(others)) == said(as_one(members(2, "method.rank=8")))
    assert [each.method.rank for each in others] == [4, 12]


@pytest.mark.parametrize(("card", "is_doubtful"), [(8, True), (80, False)])
def test_a_job_that_may_not_fit_its_card_says_so_before_it_runs(card: int, is_doubtful: bool) -> None:
    whole = as_one(members(8))
    seen = HostFacts(card_bytes=card * GIB, members=8)
    note_estimate(seen, whole)
    assert seen.estimate is not None
    assert seen.estimate.slots == 512, "a member's own rows, which its steps are compared with"
    said = doubt_of_job(whole, seen)
    assert ("8 adapters" in said and "gradient_checkpointing=full" in said) if is_doubtful else said == ""
