"""The rules of torch's caching allocator, and the tape that is replayed through it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.fit.allocator import Allocator, OutOfMemory, replay
from lora_lab.fit.tape import Tape

MIB = 2**20


def test_segments_have_the_sizes_that_torch_asks_for() -> None:
    for asked, segment in (
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB),
    ):
        allocator = Allocator()
        allocator.take(asked)
        assert allocator.reserved == segment


def test_what_is_given_back_is_taken_again() -> None:
    allocator = Allocator()
    allocator.give(allocator.take(30 * MIB))
    allocator.take(12 * MIB)
    allocator.take(16 * MIB)  # the rest of the same segment
    assert allocator.reserved == 30 * MIB
    allocator.take(4 * MIB)
    assert allocator.reserved == 50 * MIB


def test_neighbours_become_one_again() -> None:
    allocator = Allocator()
    parts = [allocator.take(size * MIB) for size in (4, 4, 16)]  # the third has a segment of its own
    for part in parts[:2]:
        allocator.give(part)
    allocator.take(20 * MIB)
    assert allocator.reserved == 36 * MIB


def test_a_piece_that_is_too_small_to_split_off_stays_with_its_block() -> None:
    allocator = Allocator()
    allocator.give(allocator.take(30 * MIB))
    allocator.take(29 * MIB + MIB // 2)
    allocator.take(MIB // 4)
    assert allocator.reserved == 32 * MIB


def test_within_a_limit_what_is_cached_goes_back_first() -> None:
    allocator = Allocator(limit=40 * MIB)
    allocator.give(allocator.take(30 * MIB))
    allocator.take(36 * MIB)
    assert allocator.reserved == 36 * MIB
    with pytest.raises(OutOfMemory):
        allocator.take(10 * MIB)


SIZES = st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), min_size=1, max_size=60)


@given(SIZES)
def test_reserved_is_never_less_than_what_is_live(steps: list[tuple[int, bool]]) -> None:
    tape = Tape()
    live: list[int] = []
    for size, ends_one in steps:
        live.append(tape.new(size, "working"))
        if ends_one:
            tape.free(live.pop(0))
    tape.free(*live)
    most = tape.peak().total()
    reserved = replay(tape)
    assert most <= reserved
    assert replay(tape, limit=reserved) <= reserved
    with pytest.raises(OutOfMemory):
        replay(tape, limit=most - 1)


def test_the_peak_is_of_the_steps_and_not_of_loading() -> None:
    tape = Tape()
    whole = tape.new(100, "weights")
    kept = tape.new(40, "weights")
    tape.free(whole)
    tape.loaded = len(tape.events)
    tape.free(tape.new(30, "loss"), tape.new(5, "working"))
    assert tape.peak() == {"weights": 40, "loss": 30, "working": 5}
    assert tape.sizes[kept] == 40


def test_steps_of_a_graph_use_no_gap_that_loading_left() -> None:
    def tape(own_pool: bool) -> Tape:
        tape = Tape(has_own_pool=own_pool)
        first = tape.new(8 * MIB, "weights")
        tape.new(8 * MIB, "weights")
        tape.free(first)
        tape.loaded = len(tape.events)
        tape.free(tape.new(8 * MIB, "activations"))
        return tape

    assert replay(tape(own_pool=False)) == 20 * MIB
    assert replay(tape(own_pool=True)) == 40 * MIB
