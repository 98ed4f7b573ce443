"""Which values of a setting go on after a rung, whatever their trials ended with."""

import math

from hypothesis import given
from hypothesis import strategies as st

from lora_lab.comparison.halving import NOT_STOPPED, Tried, at_the_edge, choose, kept

LOSSES = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([1.0, 2.0])
"""Some of them are ties."""


def tried(*losses: float | None) -> list[Tried]:
    return [Tried(f"learning_rate={place}", loss, "it ended as diverged") for place, loss in enumerate(losses)]


@given(st.lists(LOSSES, min_size=1, max_size=9), st.integers(1, 9))
def test_the_lowest_finite_losses_go_on_and_every_other_value_has_a_reason(
    losses: list[float | None], keep: int
) -> None:
    values = tried(*losses)
    said = choose(values, keep)
    assert set(said) == {each.value for each in values}
    going = [each for each in values if said[each.value] == NOT_STOPPED]
    stopped = [each for each in values if said[each.value] != NOT_STOPPED]
    usable = [each for each in values if each.loss is not None and math.isfinite(each.loss)]
    assert len(going) == min(keep, len(usable))
    assert all(each in usable for each in going)
    for loser in stopped:
        assert said[loser.value]
        for winner in going if loser in usable else []:
            assert (winner.loss, values.index(winner)) < (loser.loss, values.index(loser)), "ties go to the first"


@given(st.integers(1, 40), st.integers(2, 6))
def test_rungs_end_with_one_value_and_never_with_none(values: int, rungs: int) -> None:
    left, total = values, 0
    for rung in range(rungs):
        total += left
        left = kept(left, rung + 2 == rungs) if rung + 1 < rungs else left
        assert left >= 1
    assert left == 1
    assert total <= values * rungs


def test_a_reason_names_what_it_was_behind() -> None:
    said = choose(tried(3.21, 3.05, math.nan, None, 3.05), 1)
    assert said == {
        "learning_rate=0": "its held-out loss 3.2100 was behind 3.0500 of learning_rate=1",
        "learning_rate=1": NOT_STOPPED,
        "learning_rate=2": "its held-out loss is nan",
        "learning_rate=3": "it ended as diverged",
        "learning_rate=4": "its held-out loss 3.0500 was also that of learning_rate=1, which was asked for first",
    }


def test_the_ends_of_a_grid_are_its_numbers_and_not_its_order() -> None:
    grid = ["learning_rate=1e-3", "learning_rate=0.0001", "learning_rate=3e-4"]
    assert [at_the_edge(each, grid) for each in grid] == ["highest", "lowest", ""]
    assert at_the_edge("optimizer=adamw", ["optimizer=adamw", "optimizer=lomo"]) == ""
    assert at_the_edge(grid[0], grid[:1]) == "", "the only value that was tried"
