"""The rules of torch's caching allocator, and the tape that is replayed through them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.fit.allocator import OutOfMemory
from lora_lab.fit.expandable import ExpandableAllocator
from lora_lab.fit.fixed import FixedAllocator
from lora_lab.fit.replay import replay
from lora_lab.fit.tape import Tape

MIB = 2**20


def test_fixed_segments_have_the_sizes_that_torch_asks_for() -> None:
    for asked, segment in (
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB),
    ):
        allocator = FixedAllocator()
        allocator.take(asked)
        assert allocator.reserved == segment


def test_what_is_given_back_to_a_fixed_segment_is_taken_again() -> None:
    allocator = FixedAllocator()
    allocator.take(30 * MIB)()
    allocator.take(12 * MIB)
    allocator.take(16 * MIB)  # the rest of the same segment
    assert allocator.reserved == 30 * MIB
    allocator.take(4 * MIB)
    assert allocator.reserved == 50 * MIB


def test_neighbours_become_one_again() -> None:
    fixed = FixedAllocator()
    ends = [fixed.take(size * MIB) for size in (4, 4, 16)]  # the third has a segment of its own
    for end in ends[:2]:
        end()
    fixed.take(20 * MIB)
    assert fixed.reserved == 36 * MIB
    expandable = ExpandableAllocator()
    ends = [expandable.take(size * MIB) for size in (4, 4, 32)]
    for end in reversed(ends[:2]):
        end()
    expandable.take(8 * MIB)
    assert expandable.reserved == 40 * MIB


def test_a_piece_that_is_too_small_to_split_off_stays_with_its_block_in_a_fixed_segment() -> None:
    allocator = FixedAllocator()
    allocator.take(30 * MIB)()
    allocator.take(29 * MIB + MIB // 2)
    allocator.take(MIB // 4)
    assert allocator.reserved == 32 * MIB


def test_within_a_limit_what_is_cached_goes_back_first() -> None:
    for allocator in (FixedAllocator(limit=40 * MIB), ExpandableAllocator(limit=40 * MIB)):
        allocator.take(30 * MIB)()
        allocator.take(36 * MIB)
        assert allocator.reserved == (36 * MIB if isinstance(allocator, FixedAllocator) else 40 * MIB)
        with pytest.raises(OutOfMemory):
            allocator.take(10 * MIB)


def test_an_expandable_segment_grows_by_pages_at_its_end() -> None:
    allocator = ExpandableAllocator()
    allocator.take(5 * MIB)
    assert allocator.reserved == 20 * MIB
    grown = allocator.take(30 * MIB)  # 15 MiB are there
    assert allocator.reserved == 40 * MIB
    allocator.take(MIB)
    assert allocator.reserved == 42 * MIB  # small ones have addresses of their own
    grown()
    allocator.take(50 * MIB)
    assert allocator.reserved == 62 * MIB


def test_the_growing_end_of_an_expandable_segment_is_taken_last() -> None:
    allocator = ExpandableAllocator()
    first, _, last = (allocator.take(size * MIB) for size in (16, 4, 10))
    first()
    last()
    allocator.take(12 * MIB)  # fits both the gap of 16 and the end of 20: the gap is taken
    allocator.take(20 * MIB)
    assert allocator.reserved == 40 * MIB


def test_expandable_segments_return_pages_between_those_in_use() -> None:
    allocator = ExpandableAllocator()
    allocator.take(10 * MIB)
    middle = allocator.take(60 * MIB)
    allocator.take(10 * MIB)
    middle()
    allocator.return_cached()
    assert allocator.reserved == 40 * MIB
    allocator.take(40 * MIB)  # the gap is filled first
    assert allocator.reserved == 80 * MIB
    allocator.take(20 * MIB)
    assert allocator.reserved == 80 * MIB


def test_while_a_graph_is_recorded_nothing_is_returned() -> None:
    for kind in (FixedAllocator, ExpandableAllocator):
        allocator = kind(limit=60 * MIB, gives_back=False)
        allocator.take(30 * MIB)()
        with pytest.raises(OutOfMemory):
            allocator.take(41 * MIB)


SIZES = st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), min_size=1, max_size=60)


@given(SIZES, st.booleans())
def test_reserved_is_never_less_than_what_is_live(steps: list[tuple[int, bool]], is_expandable: bool) -> None:
    tape = Tape(is_expandable=is_expandable)
    live: list[int] = []
    for size, ends_one in steps:
        live.append(tape.new(size, "working"))
        if ends_one:
            tape.free(live.pop(0))
    tape.free(*live)
    most = tape.peak().total()
    reserved = replay(tape)
    assert most <= reserved <= most + 40 * MIB * len(steps)
    enough = reserved + max(tape.sizes) + 20 * MIB
    assert replay(tape, limit=enough) <= enough
    with pytest.raises(OutOfMemory):
        # torch compares in steps of 2 MiB with the limit, and then takes a page of 20 MiB
        replay(tape, limit=most - 1 - (20 * MIB if is_expandable else 0))


@given(SIZES)
def test_an_expandable_segment_without_gaps_holds_no_more_than_a_page_each(steps: list[tuple[int, bool]]) -> None:
    allocator = ExpandableAllocator()
    for size, _ in steps:
        allocator.take(size)
    live = sum(-(-size // 512) * 512 for size, _ in steps)
    assert live <= allocator.reserved < live + 22 * MIB


@given(SIZES)
def test_what_is_given_back_whole_returns_to_the_driver(steps: list[tuple[int, bool]]) -> None:
    allocator = ExpandableAllocator()
    ends = [(allocator.take(size), is_first) for size, is_first in steps]
    for end, is_first in ends:
        if is_first:
            end()
    allocator.return_cached()
    for end, is_first in ends:
        if not is_first:
            end()
    allocator.return_cached()
    assert allocator.reserved == 0


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
    def tape(own_pool: bool, is_expandable: bool) -> Tape:
        tape = Tape(has_own_pool=own_pool, is_expandable=is_expandable)
        first = tape.new(8 * MIB, "weights")
        tape.new(8 * MIB, "weights")
        tape.free(first)
        tape.loaded = len(tape.events)
        tape.free(tape.new(8 * MIB, "activations"))
        return tape

    for is_expandable in (True, False):
        assert replay(tape(False, is_expandable)) == 20 * MIB
        assert replay(tape(True, is_expandable)) == 40 * MIB
