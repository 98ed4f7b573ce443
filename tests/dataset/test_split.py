"""Rows that are held out: chosen by content, apart from what is trained, the same wherever they stand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import InvalidInput
from lora_lab.dataset.row import Conversation
from lora_lab.dataset.split import check_row_count, heldout_indices, split_rows


def numbered(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def held(rows: list[str], share: float) -> list[str]:
    return [rows[index] for index in heldout_indices(rows, share)]


@given(count=st.integers(1, 2000), share=st.floats(0, 1, exclude_min=True, exclude_max=True), seed=st.integers())
def test_neither_the_order_of_the_rows_nor_random_numbers_change_what_is_held_out(
    count: int, share: float, seed: int
) -> None:
    rows = numbered(count)
    first = held(rows, share)
    random.seed(seed)
    state = random.getstate()
    assert held(rows, share) == first
    assert random.getstate() == state, "the seeded order of the rows would change"
    random.shuffle(rows)
    assert held(rows, share) == first
    assert 1 <= len(set(first)) == len(first) <= count
    assert abs(len(first) - count * share) <= 1


@given(count=st.integers(10, 1000), more=st.integers(0, 300))
def test_in_a_file_that_grew_the_old_rows_are_held_out_in_the_same_order(count: int, more: int) -> None:
    """The first of them are evaluated, so those are the same ones too."""
    before, after = held(numbered(count), 0.2), held(numbered(count + more), 0.2)
    kept = [row for row in after if int(row) < count]
    assert kept[: len(before)] == before[: len(kept)]


def test_a_tenth_more_rows_move_few_of_those_held_out() -> None:
    before, after = held(numbered(5000), 0.1), held(numbered(5500), 0.1)
    assert len(set(before) & set(after)) >= 0.9 * len(before)


def test_held_out_losses_of_this_version_s_trials_stay_comparable() -> None:
    assert held(numbered(20), 0.2) == ["9", "8", "13", "17"]


def test_held_out_rows_come_from_everywhere() -> None:
    tenths = {index // 100 for index in heldout_indices(numbered(1000), 0.1)}
    assert tenths == set(range(10))


@given(count=st.integers(1, 300), share=st.floats(0.001, 0.999), needed=st.integers(1, 300))
def test_too_few_rows_means_that_one_step_cannot_be_filled(count: int, share: float, needed: int) -> None:
    remain = count - len(heldout_indices(numbered(count), share))
    if remain >= needed:
        check_row_count(count, share, needed)
    else:
        with pytest.raises(InvalidInput, match=f"{count} rows, {remain} after"):
            check_row_count(count, share, needed)


@given(copies=st.lists(st.integers(1, 6), min_size=2, max_size=60), share=st.floats(0.01, 0.9), seed=st.integers())
def test_no_row_that_is_held_out_is_trained_on_however_often_it_comes(
    copies: list[int], share: float, seed: int
) -> None:
    rows = [str(number) for number, count in enumerate(copies) for _ in range(count)]
    random.Random(seed).shuffle(rows)
    room = max(1, round(len(rows) * share))
    if room < min(copies):
        with pytest.raises(InvalidInput, match=r"data\.holdout=0\.\d+ or more"):
            heldout_indices(rows, share)
        return
    apart = set(heldout_indices(rows, share))
    assert 1 <= len(apart) <= room, "check_row_count counts on it"
    assert not {rows[i] for i in apart} & {row for i, row in enumerate(rows) if i not in apart}
    assert set(heldout_indices(rows, share)) == apart


def test_rows_that_are_all_equal_are_refused() -> None:
    with pytest.raises(InvalidInput, match="all 20 rows are equal"):
        split_rows([row("a", "b")] * 20, 0.1)


def row(question: str, answer: str) -> Conversation:
    return Conversation.of(question, answer)


def test_a_split_counts_what_it_cannot_keep_apart() -> None:
    rows = [row(text, "a") for text in numbered(20)]
    assert split_rows(rows, 0.1).held == heldout_indices(rows, 0.1)
    assert split_rows(rows, 0.1).prompts_trained == 0
    assert split_rows([row("the same", text) for text in numbered(20)], 0.1).prompts_trained == 2


def test_a_file_of_held_out_rows_is_the_split() -> None:
    rows = [row(text, "a") for text in numbered(5)]
    split = split_rows([*rows, row("new", "b"), row("3", "another")], 0.5, own=2)
    assert (split.held, split.prompts_trained) == ([5, 6], 1)
