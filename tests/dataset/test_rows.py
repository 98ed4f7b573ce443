"""Rows from a file: what is broken is named."""

import json
import math
import shlex
from pathlib import Path

import pytest

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig, MapConfig
from lora_lab.dataset.row import Conversation, Row
from lora_lab.dataset.rows import rows_of
from lora_lab.dataset.shipped import SHIPPED
from lora_lab.dataset.sources import file_rows
from lora_lab.options import DataSource

GOOD = '{"instruction": "Why?", "output": "Because."}'


def written(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def row_of(fields: dict[str, object], **columns: str) -> Row:
    [row] = rows_of([(1, fields)], DataConfig(map=MapConfig(**columns)), "rows.jsonl", "line")
    return row


def read(path: Path, limit: int | None = None) -> list[Row]:
    return file_rows(DataConfig(source=DataSource.file, path=str(path), rows=limit)).rows


def refusal(path: Path, limit: int | None = None) -> str:
    with pytest.raises(InvalidInput) as info:
        read(path, limit)
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


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    assert len(read(written(tmp_path, GOOD, "", GOOD, "{"), 2)) == 2


def test_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    answer = "one\u2028two\u0085three"
    line = json.dumps({"instruction": "Why?", "output": answer}, ensure_ascii=False)
    assert read(written(tmp_path, line)) == [Conversation.of("Why?", answer)]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    rows = read(written(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r", GOOD + "\r"))
    assert rows == [Conversation.of("Why?", "Because.")] * 2


def test_columns_by_other_names_and_an_optional_input() -> None:
    columns = {"instruction": "q", "input": "context", "output": "a"}
    assert row_of({"q": " Why? ", "a": "So."}, **columns) == Conversation.of("Why?", "So.")
    assert row_of({"q": "Why?", "context": None, "a": "So."}, **columns) == Conversation.of("Why?", "So.")
    assert row_of({"q": "Why?", "context": " this ", "a": "So."}, **columns) == Conversation.of("Why?\n\nthis", "So.")
    with pytest.raises(InvalidInput, match=r"no column a; found q, output"):
        row_of({"q": "Why?", "output": "So."}, **columns)


def test_the_shipped_rows_are_sound_and_none_comes_twice() -> None:
    rows = read(SHIPPED)
    assert len(rows) >= 300
    assert len(set(rows)) == len(rows)


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
    assert read(path) == AS_ROWS
    assert read(path, 2) == AS_ROWS[:2]


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
