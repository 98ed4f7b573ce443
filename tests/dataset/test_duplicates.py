"""Rows that come more than once: what counts as equal, nearly equal and different."""

import random

import pytest

from lora_lab.data_config import DataConfig
from lora_lab.dataset.duplicates import NEAR, near_duplicates, runs_of_words, without_duplicates
from lora_lab.dataset.shipped import SHIPPED
from lora_lab.dataset.sources import file_rows
from lora_lab.options import Duplicates

WORDS = [f"word{number}" for number in range(400)]


def text(seed: int, count: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def joined(words: list[str]) -> str:
    return " ".join(words)


LONG = text(0)
OTHERS = [joined(text(seed)) for seed in range(1, 30)]


@pytest.mark.parametrize(
    ("changed", "near"),
    [
        (joined(LONG).upper() + "!", True),
        (joined([*LONG[:-1], "other"]), True),
        (joined([*LONG[:30], "other", *LONG[31:]]), True),
        (joined(LONG[:40]), False),
        (joined(LONG[::-1]), False),
    ],
    ids=["case", "last_word", "one_word", "two_thirds", "backwards"],
)
def test_a_few_words_make_a_near_duplicate_and_many_do_not(changed: str, near: bool) -> None:
    assert near_duplicates([joined(LONG), *OTHERS, changed]) == ({len(OTHERS) + 1} if near else set())


def test_short_rows_are_near_duplicates_only_when_all_their_words_are_the_same() -> None:
    assert near_duplicates(["What is 2+2? 4", "What is 2+3? 5", "what is 2 + 2: 4"]) == {2}
    assert near_duplicates(["yes", "no", "Yes!"]) == {2}
    assert near_duplicates(["你好!请问现在几点钟了呢", "你好!请问今天几月几号呢", "你好请问现在几点钟了呢"]) == {2}


def test_nearly_all_pairs_above_the_mark_are_found_and_none_below_it() -> None:
    """Against comparing every pair."""
    rows, rng = [], random.Random(7)
    for seed in range(150):
        base = text(seed)
        rows.append(joined(base))
        changed = [rng.choice(WORDS) if rng.random() < 0.04 else word for word in base]
        rows.append(joined(changed))
    sets = [runs_of_words(row) for row in rows]

    def alike(one: int, other: int) -> bool:
        return len(sets[one] & sets[other]) >= NEAR * len(sets[one] | sets[other])

    true = {place for place in range(len(rows)) if any(alike(place, earlier) for earlier in range(place))}
    found = near_duplicates(rows)
    assert 20 < len(true) < 140
    assert found <= true
    assert len(found) >= 0.95 * len(true)


def test_what_is_kept_and_what_is_counted() -> None:
    rows = ["a b c d e f g h i j k l m n o p", "x", "x", "A b c d e f g h i j k l m n o p.", "x"]
    kept = {how: without_duplicates(rows, how) for how in Duplicates}
    assert kept[Duplicates.keep].rows == rows
    assert kept[Duplicates.exact].rows == [rows[0], "x", rows[3]]
    assert kept[Duplicates.near].rows == [rows[0], "x"]
    assert [each.dropped for each in kept.values()] == [0, 2, 3]
    assert {(each.repeated, each.near_repeated) for each in kept.values()} == {(2, 1)}


def test_of_too_many_rows_near_duplicates_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lab.dataset.duplicates.MOST_COUNTED", 2)
    assert without_duplicates(["a", "b", "A"], Duplicates.exact).near_repeated is None
    assert without_duplicates(["a", "b", "A"], Duplicates.near).near_repeated == 1


def test_the_shipped_rows_are_sound_and_none_comes_twice() -> None:
    rows = file_rows(DataConfig()).rows
    assert SHIPPED.is_file()
    assert len(rows) >= 300
    found = without_duplicates(rows, Duplicates.near)
    assert (found.repeated, found.near_repeated) == (0, 0)
