"""Runs, names and folders that somebody else put into a store: one of them never costs the others' report."""

import contextlib
import dataclasses
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from planted import deliver, factorial
from test_stored_runs import a_sweep, a_trial, address, both_ways, put, root, tracker_of

from lora_lab.best import main as best
from lora_lab.config import InvalidInput
from lora_lab.report.__main__ import main as report
from lora_lab.report.writing.page.page_file import choose_place
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.record import Point
from lora_lab.store.run_checks import _NUMBERS, _OPTIONAL, fault_of, printable
from lora_lab.store.stored_runs import open_store

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
    ("harm", "changes"),
    [
        ("UPDATE runs SET start_time = NULL WHERE run_uuid = ?", {"started_ms": None}),
        ("UPDATE runs SET start_time = -5 WHERE run_uuid = ?", {"started_ms": -5}),
        ("UPDATE runs SET start_time = 99999999999999999 WHERE run_uuid = ?", {"started_ms": 99999999999999999}),
        (
            "UPDATE params SET value = 'two' WHERE key = 'batch_size' AND run_uuid = ?",
            {"params": {"batch_size": "two"}},
        ),
        ("UPDATE params SET value = '' WHERE key = 'seq_len' AND run_uuid = ?", {"params": {"seq_len": ""}}),
    ],
)
def test_one_odd_run_is_left_out_by_both_ways_and_the_others_stay(
    root: Path, harm: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    above = a_sweep()
    put(root, above)
    records = [a_trial(number, above, params={"batch_size": "2", "seq_len": "64"}) for number in range(3)]
    ids = [put(root, record) for record in records]
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        assert store.execute(harm, (ids[1],)).rowcount == 1
    folder = Path(records[1].tags["folder"])
    (folder / "record.json").write_text(json.dumps(dataclasses.asdict(records[1]) | changes))
    for way in both_ways(root):
        trials, sweeps = way.last_sweep()
        assert {trial.run_id for trial in trials} == {ids[0], ids[2]}
        assert len(sweeps) == 1
        said = capsys.readouterr().err
        if "start_time" not in harm:  # MLflow gives no run without a start, and both are read before the first is used
            assert ids[1] in said


ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202eturned\u2066"


def test_what_a_terminal_would_obey_is_not_read(root: Path) -> None:
    record = a_trial(name=f"mine{ESCAPES}")
    record.params |= {"model": f"model{ESCAPES}"}
    record.tags |= {"device": f"card{ESCAPES}"}
    put(root, record)
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
        with pytest.raises(InvalidInput, match="not a lora_lab page"):
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


def test_markup_in_a_stores_texts_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "[/bold][red]x[\\[/]"
    levels = {"optimizer": [f"a{text}", "b"], "shape": ["1x512", "2x512"]}
    trials = factorial(levels, {}, noise=0.01, sweep="a" * 32, random=5)
    for one in trials:
        one.tags.update(
            {"machine.cpu": text, "version.torch": text, "code": text, "regime": text, "machine.cpu_count": text}
        )
    store = deliver(tmp_path, trials)
    assert report(["--store", store]) == 0
    assert best(["--store", store]) in (0, 3)
    assert report(["--store", store, "--against", trials[0].run_id]) in (0, 1, 2, 3)
    assert text in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "change",
    [
        "timestamp = 'soon'",
        "timestamp = -4",
        "step = 'first'",
        "value = 'fast'",
        "value = x'00ff'",
        "value = 1.7e308",
    ],
)
def test_an_odd_point_of_a_series_is_left_out(root: Path, change: str) -> None:
    points = [Point(key="step/loss", value=1.0 + n, step=n, t_ms=1_700_000_000_000 + n) for n in range(4)]
    run_id = tracker_of(root).deliver(a_trial(series=points), [])
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        harmed = store.execute(f"UPDATE metrics SET {change} WHERE step = 2 AND key = 'Steps/loss'").rowcount
    assert harmed == 1
    series = open_store(address(root)).series(run_id)
    assert [value for _, _, value in series["step/loss"]] == [1.0, 2.0, 4.0]


def test_damaged_series_cost_a_folder_only_its_timeline(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = a_trial(series=[Point(key="step/loss", value=1.0, step=1, t_ms=1_700_000_000_000)])
    run_id = put(root, record)
    odd = dataclasses.asdict(record) | {"series": [{"key": "step/loss", "value": "fast", "step": 1, "t_ms": 7}]}
    (Path(record.tags["folder"]) / "record.json").write_text(json.dumps(odd))
    folders, _ = both_ways(root)
    assert [trial.run_id for trial in folders.runs()[0]] == [run_id]
    assert folders.series(run_id) == {}
    assert "series[0].value" in capsys.readouterr().err


def test_a_text_that_is_not_utf_8_does_not_keep_folders_from_being_read(root: Path) -> None:
    ids = [put(root, a_trial(number)) for number in range(2)]
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        store.execute("UPDATE tags SET value = cast(x'ff41' as text) WHERE key = 'device' AND run_uuid = ?", (ids[0],))
    folders, stored = both_ways(root)
    assert {trial.run_id for trial in folders.runs()[0]} == set(ids)
    with pytest.raises(TrackingFailed):
        stored.runs()
