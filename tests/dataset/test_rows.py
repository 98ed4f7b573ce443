"""Rows from a file: what is broken is named, what is held out does not move."""

import bz2
import contextlib
import gzip
import json
import lzma
import math
import os
import random
import shlex
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import DataConfig, InvalidInput, MapConfig
from lora_lab.dataset.row import Conversation, Row
from lora_lab.dataset.rows import SHIPPED, Split, check_row_count, heldout_indices, read_jsonl, rows_of, split_rows

GOOD = '{"instruction": "Why?", "output": "Because."}'


def written(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def row_of(fields: dict[str, object], **columns: str) -> Row:
    [row] = rows_of([(1, fields)], DataConfig(map=MapConfig(**columns)), "rows.jsonl", "line")
    return row


def refusal(path: Path, limit: int | None = None) -> str:
    with pytest.raises(InvalidInput) as info:
        read_jsonl(path, DataConfig(), limit)
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
    assert "lines 2, 3, 4, 5, 6 and 4 more: not JSON" in told
    assert told.count("not JSON") == 1, "one fault is said once"


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
    assert len(read_jsonl(written(tmp_path, GOOD, "", GOOD, "{"), DataConfig(), 2)) == 2


def test_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    answer = "one\u2028two\u0085three"
    line = json.dumps({"instruction": "Why?", "output": answer}, ensure_ascii=False)
    assert read_jsonl(written(tmp_path, line), DataConfig()) == [Conversation.of("Why?", answer)]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    rows = read_jsonl(written(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r", GOOD + "\r"), DataConfig())
    assert rows == [Conversation.of("Why?", "Because.")] * 2


def test_columns_by_other_names_and_an_optional_input() -> None:
    columns = {"instruction": "q", "input": "context", "output": "a"}
    assert row_of({"q": " Why? ", "a": "So."}, **columns) == Conversation.of("Why?", "So.")
    assert row_of({"q": "Why?", "context": None, "a": "So."}, **columns) == Conversation.of("Why?", "So.")
    assert row_of({"q": "Why?", "context": " this ", "a": "So."}, **columns) == Conversation.of("Why?\n\nthis", "So.")
    with pytest.raises(InvalidInput, match=r"no column a; found q, output"):
        row_of({"q": "Why?", "output": "So."}, **columns)


def test_the_shipped_rows_are_sound_and_none_comes_twice() -> None:
    rows = read_jsonl(SHIPPED, DataConfig())
    assert len(rows) >= 300
    assert len(set(rows)) == len(rows)


@given(count=st.integers(1, 2000), share=st.floats(0, 1, exclude_min=True, exclude_max=True), seed=st.integers())
def test_what_is_held_out_depends_on_nothing_but_the_count(count: int, share: float, seed: int) -> None:
    first = heldout_indices(range(count), share)
    random.seed(seed)
    state = random.getstate()
    assert heldout_indices(range(count), share) == first
    assert random.getstate() == state, "the seeded order of the rows would change"
    assert 1 <= len(first) <= count
    assert abs(len(first) - count * share) <= 1
    assert first <= set(range(count))


def test_held_out_losses_of_older_trials_stay_comparable() -> None:
    assert heldout_indices(range(20), 0.2) == {12, 13, 1, 8}


def test_held_out_rows_come_from_everywhere() -> None:
    tenths = {index // 100 for index in heldout_indices(range(1000), 0.1)}
    assert tenths == set(range(10))


@given(count=st.integers(1, 300), share=st.floats(0.001, 0.999), needed=st.integers(1, 300))
def test_too_few_rows_means_that_one_step_cannot_be_filled(count: int, share: float, needed: int) -> None:
    remain = count - len(heldout_indices(range(count), share))
    if remain >= needed:
        check_row_count(count, share, needed)
    else:
        with pytest.raises(InvalidInput, match=f"{count} rows, {remain} after"):
            check_row_count(count, share, needed)


@given(copies=st.lists(st.integers(1, 6), min_size=2, max_size=60), share=st.floats(0.01, 0.9), seed=st.integers())
def test_no_row_that_is_held_out_is_trained_on_however_often_it_comes(
    copies: list[int], share: float, seed: int
) -> None:
    rows = [Conversation.of(str(number), "a") for number, count in enumerate(copies) for _ in range(count)]
    random.Random(seed).shuffle(rows)
    room = max(1, round(len(rows) * share))
    if room < min(copies):
        with pytest.raises(InvalidInput, match=r"data\.holdout=0\.\d+ or more"):
            heldout_indices(rows, share)
        return
    held = heldout_indices(rows, share)
    assert 1 <= len(held) <= room, "check_row_count counts on it"
    assert not {rows[i] for i in held} & {row for i, row in enumerate(rows) if i not in held}
    assert heldout_indices(rows, share) == held


def test_rows_that_are_all_equal_are_refused() -> None:
    with pytest.raises(InvalidInput, match="all 20 rows are equal"):
        split_rows([Conversation.of("a", "b")] * 20, 0.1)


def test_a_split_counts_what_it_cannot_keep_apart() -> None:
    assert split_rows([Conversation.of(str(i), "a") for i in range(20)], 0.1) == Split(
        heldout_indices(range(20), 0.1), 0, 0
    )
    repeated = split_rows([Conversation.of(str(i % 10), "a") for i in range(20)], 0.2)
    assert (repeated.repeated, repeated.prompts_trained, len(repeated.held)) == (10, 0, 4)
    asked_again = split_rows([Conversation.of("the same", str(i)) for i in range(20)], 0.1)
    assert (asked_again.repeated, asked_again.prompts_trained) == (0, 2)


def test_the_shipped_rows_are_held_out_as_in_older_trials() -> None:
    rows = read_jsonl(SHIPPED, DataConfig())
    assert heldout_indices(rows, 0.1) == set(random.Random(0).sample(range(len(rows)), round(0.1 * len(rows))))


FIELDS = {"instruction": "Why?", "input": "this", "output": "Because."}


@pytest.mark.parametrize("column", FIELDS)
@pytest.mark.parametrize("value", [0, 0.0, 5, math.nan, False, True, [], {}, ["a"], {"a": "b"}], ids=repr)
def test_what_is_no_text_is_refused_whether_python_holds_it_for_empty_or_not(column: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=f"{column} must be text"):
        row_of(FIELDS | {column: value})


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_only_absent_null_and_blank_text_are_an_empty_input(value: str | None) -> None:
    without = {name: text for name, text in FIELDS.items() if name != "input"}
    assert row_of(FIELDS | {"input": value}) == row_of(without) == Conversation.of("Why?", "Because.")


@pytest.mark.parametrize("column", FIELDS)
@pytest.mark.parametrize("half", ["\ud83d", "\ude00\ud83d"], ids=ascii)
def test_half_a_character_is_refused_in_what_is_used_and_nowhere_else(column: str, half: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{column} holds \\ud"):
        row_of(FIELDS | {column: f"ok {half} done"})
    assert row_of(FIELDS | {"more": half}) == row_of(FIELDS)
    with pytest.raises(InvalidInput) as info:
        row_of({half: 1})
    assert str(info.value).isascii(), "a terminal gets it"


def test_no_text_stands_in_a_prompt_twice_and_no_answer_in_a_prompt() -> None:
    assert row_of(FIELDS, instruction="input", output="output") == Conversation.of("this", "Because.")
    assert row_of(FIELDS, instruction="instruction", output="input") == Conversation.of("Why?", "this")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"instruction": "a", "output": "b", "n": ' + "9" * 5000 + "}", "too many digits"),
        ('{"instruction": "a", "output": "b", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "'output' comes twice"),
        ('{"instruction": "a", "output": "b \\ud83d"}', "half of a character"),
        ('{"instruction": "a", "output": NaN}', "output must be text, and is NaN"),
        ('{"instruction": "a", "output": "b"}' * 2, "Extra data"),
        ("\0" * 20, "not JSON"),
        (b'{"instruction": "caf\xe9", "output": "b"}', "not UTF-8 (the byte 0xe9"),
        (b'{"instruction": "\xed\xa0\xbd", "output": "b"}', "not UTF-8"),
    ],
    ids=["digits", "deep", "key_twice", "half", "nan", "two", "nul", "latin1", "surrogate_bytes"],
)
def test_a_line_that_python_stumbles_over_is_named_like_any_other(tmp_path: Path, line: str | bytes, says: str) -> None:
    accented = '{"instruction": "Où?", "output": "Là."}'
    told = refusal(written(tmp_path, accented, line, "{", GOOD))
    assert "2 broken line(s)" in told
    assert "line 2: " in told
    assert says in told
    assert "line 3: " in told


ROWS = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(3)]
AS_ROWS = [Conversation.of(f"question {i}", f"answer {i}") for i in range(3)]


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n \n"], ids=ascii)
def test_one_list_of_objects_is_read_as_rows(tmp_path: Path, indent: int | None, before: str) -> None:
    path = written(tmp_path, before + json.dumps(ROWS, indent=indent))
    assert read_jsonl(path, DataConfig()) == AS_ROWS
    assert read_jsonl(path, DataConfig(), 2) == AS_ROWS[:2]


def test_a_fault_in_a_list_is_named_by_its_line(tmp_path: Path) -> None:
    told = refusal(written(tmp_path, json.dumps([*ROWS, 3, {"instruction": "a"}], indent=1)))
    assert ("2 broken line(s)" in told, "line 14: expected" in told, "line 15: no column" in told) == (True,) * 3


@pytest.mark.parametrize("cut", range(1, len(json.dumps(ROWS, indent=1)), 7))
def test_a_list_that_breaks_off_is_said_to(tmp_path: Path, cut: int) -> None:
    assert "one JSON list, which breaks at line" in refusal(written(tmp_path, json.dumps(ROWS, indent=1)[:cut]))


@pytest.mark.parametrize(
    ("content", "program"),
    [
        (json.dumps(ROWS[0], indent=2), "."),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), "."),
        ("\r".join(map(json.dumps, ROWS)), "."),
        (json.dumps({"data": ROWS}), ".data[]"),
        (json.dumps({"version": "1", "my rows": ROWS}, indent=2), '.["my rows"][]'),
    ],
    ids=["one", "several", "old_mac", "within", "within_printed"],
)
def test_other_json_gets_the_command_that_makes_lines_of_it(tmp_path: Path, content: str, program: str) -> None:
    assert f"jq -c {shlex.quote(program)} {tmp_path}/rows.jsonl" in refusal(written(tmp_path, content))


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["bare", "mark"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_the_encoding_is_named_and_the_command_for_it_helps(tmp_path: Path, encoding: str, mark: str) -> None:
    path = tmp_path / "rows in.jsonl"
    path.write_bytes((mark + "\n".join(map(json.dumps, ROWS))).encode(encoding))
    _, _, command = refusal(path).partition("\n")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert read_jsonl(tmp_path / "rows.jsonl", DataConfig()) == AS_ROWS


def as_parquet(path: Path) -> None:
    pandas.DataFrame(ROWS).to_parquet(path)


def as_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", GOOD)


def as_sqlite(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.execute("create table rows (instruction text, output text)")


def packed_by(pack: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: write(path, pack("\n".join(map(json.dumps, ROWS)).encode()))


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "what", "helps"),
    [
        (packed_by(gzip.compress), "gzip", True),
        (packed_by(bz2.compress), "bzip2", False),
        (packed_by(lzma.compress), "xz", False),
        (as_zip, "zip", False),
        (as_parquet, "Parquet", True),
        (as_sqlite, "SQLite", False),
        (lambda path: pandas.DataFrame(ROWS).to_csv(path, index=False), "separated values", True),
        (lambda path: pandas.DataFrame(ROWS).to_csv(path, sep="\t", index=False), "separated values", True),
        (
            lambda path: write(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "git lfs pull",
            False,
        ),
        (lambda path: write(path, b"<!DOCTYPE html><html>"), "web page", False),
        (lambda path: write(path, bytes(5000)), "NUL", False),
    ],
    ids=["gzip", "bzip2", "xz", "zip", "parquet", "sqlite", "csv", "tsv", "lfs", "html", "zeros"],
)
def test_a_file_of_another_kind_is_called_so(
    tmp_path: Path, make: Callable[[Path], None], what: str, helps: bool
) -> None:
    """Where `helps`, the command is run; the others need a program that may not be there."""
    path = tmp_path / "my rows.txt"
    make(path)
    told = refusal(path)
    assert what in told
    assert "broken line" not in told
    if helps:
        command = told.partition("\n")[2].replace("python", sys.executable, 1)
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        assert read_jsonl(tmp_path / "rows.jsonl", DataConfig()) == AS_ROWS


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_what_never_ends_is_not_begun(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "rows.jsonl")
    assert "pipe or a device" in refusal(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("path", ["x" * 5000, "a/" * 3000, "good\0.jsonl"], ids=["long_name", "long_path", "nul"])
def test_a_path_that_no_file_can_have_is_no_such_file(path: str) -> None:
    assert "no such file" in refusal(Path(path))
