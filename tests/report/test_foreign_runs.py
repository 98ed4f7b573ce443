"""Runs, names and folders that somebody else put into a store: one of them never costs the others' report."""

import contextlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from test_stored_runs import a_sweep, a_trial, both_ways, client_of, root, tracker_of

from lora_lab.config import RefusedInput
from lora_lab.report.page_file import choose_place
from lora_lab.run_checks import _NUMBERS, _OPTIONAL, fault_of, printable

__all__ = ["root"]  # a fixture
SOUND = {"started_ms": 1_700_000_000_000, "params": {"batch_size": "2"}, "metrics": {"m": 1.0}, "tags": {"t": "x"}}
PAGE = "<html><head><title>sweep x: lora_lab report</title>\n<style>:root { --ink: #000; }</style></head></html>"
THEIRS = "<html><head><title>my notes: lora_lab report</title></head></html>"


def test_a_sound_run_has_no_fault() -> None:
    assert fault_of(**SOUND) == ""
    assert fault_of(**SOUND | {"params": {"batch_size": "4", "data.rows": "None", "learning_rate": "2e-4"}}) == ""


@pytest.mark.parametrize("key", sorted(_NUMBERS))
@pytest.mark.parametrize("text", ["two", "", "[1, 2]", "1" * 5000, "\u0663", "None"])
def test_each_param_that_is_read_as_a_number_has_to_be_one(key: str, text: str) -> None:
    if text == "None" and key in _OPTIONAL:
        assert fault_of(**SOUND | {"params": {key: text}}) == ""
        return
    if text and _NUMBERS[key] is float and text.strip("1\u0663") == "":
        return  # a float takes these
    assert key in fault_of(**SOUND | {"params": {key: text}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("started_ms", value) for value in (None, -1, 0, 2**60, "yesterday", 1.5)),
        *(("params", {"model": value}) for value in (None, 3, b"x")),
        *(("tags", {"outcome": value}) for value in (None, 3, b"x")),
        *(("metrics", {"m": value}) for value in (None, "fast", b"x", 1e300, 1e-320)),
    ],
)
def test_what_is_of_another_kind_is_named(field: str, value: Any) -> None:
    assert fault_of(**SOUND | {field: value})


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE runs SET start_time = NULL WHERE run_uuid = ?",
        "UPDATE runs SET start_time = -5 WHERE run_uuid = ?",
        "UPDATE runs SET start_time = 99999999999999999 WHERE run_uuid = ?",
        "UPDATE params SET value = 'two' WHERE key = 'batch_size' AND run_uuid = ?",
        "UPDATE params SET value = '' WHERE key = 'seq_len' AND run_uuid = ?",
    ],
)
def test_one_odd_run_is_left_out_by_both_ways_and_the_others_stay(
    root: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = tracker_of(root)
    above = a_sweep()
    tracker.deliver(above, [])
    ids = []
    for number in range(3):
        record = a_trial(number, above)
        record.params |= {"batch_size": "2", "seq_len": "64"}
        ids.append(tracker.deliver(record, []))
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        assert store.execute(harm, (ids[1],)).rowcount == 1
    for way in both_ways(root):
        trials, sweeps = way.last_sweep()
        assert {trial.run_id for trial in trials} == {ids[0], ids[2]}
        assert len(sweeps) == 1
        said = capsys.readouterr().err
        unseen = ("NULL" in harm or "-5" in harm) and "_Client" in type(way._source).__name__
        assert said.count("\n") == (0 if unseen else 1)  # MLflow gives no run without a start
        assert unseen or ids[1] in said


ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202eturned\u2066"


def test_what_a_terminal_would_obey_is_not_read(root: Path) -> None:
    tracker = tracker_of(root)
    record = a_trial(name=f"mine{ESCAPES}")
    record.params |= {"model": f"model{ESCAPES}"}
    record.tags |= {"device": f"card{ESCAPES}"}
    tracker.deliver(record, [])
    client_of(root)
    for way in both_ways(root):
        [trial], _ = way.runs()
        for text in (trial.name, trial.params["model"], trial.tags["device"]):
            assert not set(text) & set("\x1b\x07\r\x9b\u202e\u2066")
            assert text.endswith("turned")


def test_ordinary_text_is_shown_as_it_is() -> None:
    for text in ("adamw 2x512", "größe 漢字 🙂", "a\u0301", "שלום"):
        assert printable(text) == text
    assert printable("two\nlines\tand a tab") == "two lines and a tab"


def beside(folder: Path, record_id: str, name: str = "sweep.json") -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"record": {"id": record_id}}))
    return {"folder": str(folder), "record_id": record_id}


@pytest.mark.parametrize("name", ["sweep.json", "trial.json"])
def test_the_page_goes_to_the_folder_that_says_it_is_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tags = beside(tmp_path / "own", "abc", name)
    assert choose_place(tags, None) == (tmp_path / "own" / "report.html", "")
    assert choose_place(tags | {"record_id": "other"}, None) == (Path("report.html"), "")
    assert choose_place(tags | {"folder": "own"}, None)[0] == Path("report.html")
    assert choose_place({"folder": str(tmp_path)}, None)[0] == Path("report.html")
    assert choose_place({}, None)[0] == Path("report.html")
    for damage in ("", "[]", "null", '{"record": []}', "\xff", "[" * 100_000):
        (tmp_path / "own" / name).write_text(damage, encoding="latin-1")
        assert choose_place(tags, None)[0] == Path("report.html")


def test_no_file_but_a_page_of_ours_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tags = beside(tmp_path / "own", "abc")
    page = tmp_path / "own" / "report.html"
    page.write_text(PAGE)
    assert choose_place(tags, None) == (page, "")
    assert choose_place(tags, page) == (page, "")
    for taken in ("theirs", "a pipe", "a folder", "a link"):
        page.unlink()
        if taken == "theirs":
            page.write_text(THEIRS)
        elif taken == "a pipe":
            os.mkfifo(page)
        elif taken == "a folder":
            page.mkdir()
        else:
            (tmp_path / "target").write_text(PAGE)
            page.symlink_to(tmp_path / "target")
        where, why = choose_place(tags, None)
        assert where == Path("report-2.html")
        assert str(page) in why
        with pytest.raises(RefusedInput, match="no page of lora_lab's"):
            choose_place(tags, page)
        if taken == "a folder":
            page.rmdir()
            page.touch()
    (tmp_path / "linked").symlink_to(tmp_path / "own", target_is_directory=True)
    assert choose_place(tags | {"folder": str(tmp_path / "linked")}, None)[0] == Path("report.html")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep.json").symlink_to(tmp_path / "own" / "sweep.json")
    assert choose_place(tags | {"folder": str(tmp_path / "other")}, None)[0] == Path("report.html")
    (tmp_path / "report-2.html").write_text("mine")
    assert choose_place(tags, None)[0] == Path("report-3.html")
