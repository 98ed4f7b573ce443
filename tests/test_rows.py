"""Rows from a file: what is broken is named, what is held out does not move."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import ColumnsConfig, RefusedInput
from lora_lab.rows import SHIPPED, Row, heldout_indices, read_jsonl, refuse_too_few, row_of

GOOD = '{"instruction": "Why?", "output": "Because."}'


def written(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def refusal(path: Path, columns: ColumnsConfig | None = None, limit: int | None = None) -> str:
    with pytest.raises(RefusedInput) as info:
        read_jsonl(path, columns or ColumnsConfig(), limit)
    return str(info.value)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ('{"instruction": "torn', "not JSON"),
        ("[1, 2]", "found list"),
        ('"text"', "found str"),
        ('{"instruction": "Why?"}', "no column output"),
        ("{}", "no column instruction and no column output; found none"),
        ('{"instruction": "Why?", "output": 3}', "must be text"),
        ('{"instruction": "Why?", "input": {"a": 1}, "output": "x"}', "must be text"),
        ('{"instruction": "Why?", "output": null}', "must be text"),
        ('{"instruction": "Why?", "output": " \\n "}', "must not be empty"),
        ('{"instruction": "", "output": "x"}', "must not be empty"),
    ],
)
def test_a_broken_line_is_named_by_its_number_in_the_file(tmp_path: Path, broken: str, says: str) -> None:
    told = refusal(written(tmp_path, GOOD, "", "  ", broken, GOOD))
    assert "1 broken line(s)" in told
    assert "line 4: " in told
    assert says in told


def test_of_many_broken_lines_the_first_are_named_and_all_counted(tmp_path: Path) -> None:
    told = refusal(written(tmp_path, GOOD, *["{"] * 9))
    assert "9 broken line(s)" in told
    assert [f"line {n}:" in told for n in range(1, 11)] == [n in range(2, 7) for n in range(1, 11)]
    assert "4 more" in told


def test_text_in_another_encoding_is_named_by_its_line_far_into_a_file(tmp_path: Path) -> None:
    latin = '{"instruction": "Où?", "output": "Là."}'.encode("latin1")
    told = refusal(written(tmp_path, *[GOOD] * 1000, latin))
    assert "UTF-8" in told
    assert "line 1001" in told


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_file_without_rows_is_refused(tmp_path: Path, lines: list[str]) -> None:
    assert "empty" in refusal(written(tmp_path, *lines))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nowhere.jsonl")
    assert "no such file" in refusal(tmp_path)


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    assert len(read_jsonl(written(tmp_path, GOOD, "", GOOD, "{"), ColumnsConfig(), 2)) == 2


def test_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    answer = "one\u2028two\u0085three"
    line = json.dumps({"instruction": "Why?", "output": answer}, ensure_ascii=False)
    assert read_jsonl(written(tmp_path, line), ColumnsConfig()) == [Row("Why?", answer)]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    rows = read_jsonl(written(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r", GOOD + "\r"), ColumnsConfig())
    assert rows == [Row("Why?", "Because.")] * 2


def test_columns_by_other_names_and_an_optional_input() -> None:
    columns = ColumnsConfig(instruction="q", input="context", output="a")
    assert row_of({"q": " Why? ", "a": "So."}, columns) == Row("Why?", "So.")
    assert row_of({"q": "Why?", "context": None, "a": "So."}, columns) == Row("Why?", "So.")
    assert row_of({"q": "Why?", "context": " this ", "a": "So."}, columns) == Row("Why?\n\nthis", "So.")
    with pytest.raises(RefusedInput, match=r"no column a; found q, output"):
        row_of({"q": "Why?", "output": "So."}, columns)


def test_the_shipped_rows_are_sound_and_none_comes_twice() -> None:
    rows = read_jsonl(SHIPPED, ColumnsConfig())
    assert len(rows) >= 300
    assert len(set(rows)) == len(rows)


@given(count=st.integers(1, 2000), share=st.floats(0, 1, exclude_min=True, exclude_max=True), seed=st.integers())
def test_what_is_held_out_depends_on_nothing_but_the_count(count: int, share: float, seed: int) -> None:
    first = heldout_indices(count, share)
    random.seed(seed)
    state = random.getstate()
    assert heldout_indices(count, share) == first
    assert random.getstate() == state, "the seeded order of the rows would change"
    assert 1 <= len(first) <= count
    assert abs(len(first) - count * share) <= 1
    assert first <= set(range(count))


def test_held_out_losses_of_older_trials_stay_comparable() -> None:
    assert heldout_indices(20, 0.2) == {12, 13, 1, 8}


def test_held_out_rows_come_from_everywhere() -> None:
    tenths = {index // 100 for index in heldout_indices(1000, 0.1)}
    assert tenths == set(range(10))


@given(count=st.integers(1, 300), share=st.floats(0.001, 0.999), needed=st.integers(1, 300))
def test_too_few_rows_means_that_one_step_cannot_be_filled(count: int, share: float, needed: int) -> None:
    remain = count - len(heldout_indices(count, share))
    if remain >= needed:
        refuse_too_few(count, share, needed)
    else:
        with pytest.raises(RefusedInput, match=f"{count} rows, {remain} after"):
            refuse_too_few(count, share, needed)
