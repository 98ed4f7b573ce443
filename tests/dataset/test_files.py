"""Files and folders of records: recognised by content and read alike; what is not read is named."""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import sqlite3
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig, SourceConfig
from lora_lab.dataset.content import by_content
from lora_lab.dataset.row import Conversation, Passage, Row
from lora_lab.dataset.selection import Selected, check_rows, select
from lora_lab.dataset.sources import Found, file_rows, heldout_rows, read_rows
from lora_lab.dataset.split import heldout_indices
from lora_lab.options import DataSource, Duplicates, Layout

ROWS = [{"instruction": f"question {i}, é", "output": f'answer {i}:\n"so"'} for i in range(3)]
AS_ROWS = [Conversation.of(f"question {i}, é", f'answer {i}:\n"so"') for i in range(3)]
TABLE = pandas.DataFrame(ROWS)
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def config_of(path: Path | None = None, **settings: object) -> DataConfig:
    data = DataConfig(source=DataSource.file, path=None if path is None else str(path))
    for key, value in settings.items():
        setattr(data, key, value)
    return data


def selected(data: DataConfig) -> Selected[Row]:
    return select(data, file_rows(data).rows, heldout_rows(data, lambda row: row))


def refusal(data: DataConfig) -> str:
    with pytest.raises(InvalidInput) as info:
        file_rows(data)
    return str(info.value)


def saved(folder: Path, **splits: int) -> Path:
    """Save a data set with this number of rows in each split; without splits all of them."""
    whole = datasets.Dataset.from_list(ROWS)
    made = datasets.DatasetDict({name: whole.select(range(count)) for name, count in splits.items()})
    (made if splits else whole).save_to_disk(folder / "saved")
    return folder / "saved"


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


MAKERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(LINES),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "printed.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "rows.csv": lambda path: TABLE.to_csv(path, index=False),
    "index.csv": TABLE.to_csv,
    "bom.csv": lambda path: TABLE.to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n"),
    "rows.tsv": lambda path: TABLE.to_csv(path, index=False, sep="\t"),
    "semicolons.txt": lambda path: TABLE.to_csv(path, index=False, sep=";"),
    "misnamed.jsonl": lambda path: TABLE.to_csv(path, index=False),
    "misnamed.csv": lambda path: path.write_bytes(LINES),
    "rows.parquet": TABLE.to_parquet,
    "rows.feather": TABLE.to_feather,
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / name
    MAKERS[name](path)
    if zipped:
        path = written(tmp_path / f"{name}.gz", gzip.compress(path.read_bytes()))
    assert file_rows(config_of(path)) == Found(AS_ROWS)
    assert file_rows(config_of(path, rows=2)).rows == AS_ROWS[:2]


def test_what_save_to_disk_made_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert file_rows(config_of(path)) == Found(AS_ROWS)
    assert "without splits" in refusal(config_of(path, split="train"))
    next(path.glob("*.arrow")).unlink()
    assert "is missing" in refusal(config_of(path))


def test_of_saved_splits_train_is_read_and_the_user_hears_of_the_others(tmp_path: Path) -> None:
    path = saved(tmp_path, train=3, test=1)
    found = file_rows(config_of(path))
    assert found.rows == AS_ROWS
    assert [("train" in remark, "test" in remark) for remark in found.remarks] == [(True, True)]
    assert file_rows(config_of(path, split="test")) == Found(AS_ROWS[:1])
    assert "it has test, train" in refusal(config_of(path, split="dev"))


def test_files_of_a_folder_are_read_in_order_and_by_split(tmp_path: Path) -> None:
    for name, row in zip(("data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"), ROWS, strict=True):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame([row]).to_parquet(tmp_path / "set" / name)
    for name in ("README.md", ".cache/train.jsonl", "dataset_infos.json"):
        written(tmp_path / "set" / name, "not rows")
    assert file_rows(config_of(tmp_path / "set")).rows == AS_ROWS[:2]
    assert file_rows(config_of(tmp_path / "set", rows=1)).rows == AS_ROWS[:1]
    assert file_rows(config_of(tmp_path / "set", split="test")).rows == AS_ROWS[2:]
    written(tmp_path / "set" / "more.jsonl", LINES)
    assert "which split" in refusal(config_of(tmp_path / "set"))


def test_a_folder_of_files_without_splits_is_read_whole(tmp_path: Path) -> None:
    for name, row in zip(("a.jsonl", "b.csv", "c.json"), ROWS, strict=True):
        pandas.DataFrame([row]).to_csv(tmp_path / name, index=False)  # whatever they are called
    assert file_rows(config_of(tmp_path)) == Found(AS_ROWS)
    assert "which split" in refusal(config_of(tmp_path, split="train"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["is a folder without data files", ".parquet"]),
        (["notes.doc"], ["is a folder without data files"]),
        (["notes.txt", "about.md", "more.txt"], ["is a folder of plain text (*.txt)"]),
        (["config.json"], ["broken line"]),
        (["config.json", "model.safetensors"], ["is a model's folder"]),
        (["test.jsonl", "dev.jsonl"], ["several splits and none of them is train", "data.split=test"]),
    ],
    ids=["empty", "no_data", "text", "only_json", "model", "no_train"],
)
def test_a_folder_that_is_no_data_set_is_called_so(tmp_path: Path, files: list[str], words: list[str]) -> None:
    for name in files:
        written(tmp_path / name, "{}" if name == "config.json" else LINES)
    said = refusal(config_of(tmp_path))
    assert [word for word in words if word not in said] == [], said


def test_a_split_of_a_single_file_is_refused(tmp_path: Path) -> None:
    assert "Leave data.split=test out" in refusal(config_of(written(tmp_path / "a.jsonl", LINES), split="test"))


HEADING = "instruction,output\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", HEADING + 'a,b\n"c,d\ne,f\n', ["begins at line 3", "quote"]),
        ("a.csv", HEADING + 'a,b\n"c "x" y",d\n', ["begins at line 3", "quote"]),
        (
            "a.csv",
            HEADING + "a,b\nc,d, and e\nf\n",
            ["line 3: 3 cells where the heading has 2", "line 4: 1"],
        ),
        ("a.csv", "output,output\na,b\n", ["'output' twice"]),
        ("a.csv", (HEADING + "a,b\nc,caf\xe9\n").encode("latin1"), ["not UTF-8", "line 3", "iconv"]),
        ("a.csv", HEADING, ["is empty"]),
        ("a.jsonl", b'{"text": "caf\xe9"}\n{"text": "b"}\n', ["not UTF-8", "line 1", "iconv"]),
        ("a.txt", "Once upon a time, there was a cat.\nIt sat.", ["plain text", "jq -Rc"]),
        ("a.gz", gzip.compress(LINES, mtime=0)[:-9], ["gzip that breaks off"]),
        ("a.parquet", b"PAR1 and nothing more", ["Parquet that can't be read"]),
        ("a.arrow", b"ARROW1 and nothing more", ["Arrow that can't be read"]),
        ("a.zip", b"PK\x03\x04 and nothing more", ["damaged zip"]),
        ("a.tar.gz", gzip.compress(bytes(10) + b"x" * 247 + b"ustar", mtime=0), ["tar archive", "tar xf"]),
        ("a.gguf", b"GGUF and more", ["a model's weights"]),
        ("a.xls", b"\xd0\xcf\x11\xe0 and more", ["old Office document", "as CSV"]),
        ("a.bz2", bz2.compress(LINES), ["bzip2", "bunzip2"]),
        ("a.xz", lzma.compress(LINES), ["xz -dk"]),
        ("a.pdf", b"%PDF-1.7", ["a PDF"]),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
        ("a.jsonl", "<!DOCTYPE html><html>", ["web page"]),
        ("a.jsonl", bytes(5000), ["NUL"]),
    ],
)
def test_what_is_not_read_is_called_what_it_is(
    tmp_path: Path, name: str, content: bytes | str, words: list[str]
) -> None:
    said = refusal(config_of(written(tmp_path / name, content)))
    assert [word for word in words if word not in said] == [], said
    assert said.count(f"data.path={tmp_path / name}") == 1


@pytest.mark.parametrize("of", ["file", "gzip", "folder"])
def test_paragraphs_of_plain_text_become_rows_by_the_command(tmp_path: Path, of: str) -> None:
    """Among them those of Windows."""
    first, second = 'Once upon a time, there\r\nwas a cat.\r\n\r\n\r\nIt said "hé".\r\n', "\nThe end.\n"
    path = tmp_path / "my notes" / "a.md"
    written(path, gzip.compress(first.encode()) if of == "gzip" else first)
    written(path.parent / "deeper" / "b.md", second)
    said, _, command = refusal(config_of(path.parent if of == "folder" else path)).partition("\n")
    assert "plain text" in said
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    found = file_rows(config_of(tmp_path / "rows.jsonl")).rows
    expected = ["Once upon a time, there\nwas a cat.", 'It said "hé".', *(["The end."] if of == "folder" else [])]
    assert sorted(found, key=str) == sorted([Passage(prompt="", text=text) for text in expected], key=str)


@pytest.mark.parametrize(
    ("member", "what"),
    [
        ("xl/workbook.xml", "an Excel workbook"),
        ("word/document.xml", "a Word document"),
        ("archive/data.pkl", "PyTorch"),
        ("rows.jsonl", "a zip archive"),
    ],
)
def test_a_zip_is_called_what_is_in_it(tmp_path: Path, member: str, what: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member, "x")
    assert what in refusal(config_of(tmp_path / "a.zip"))


def test_parquet_without_columns_and_a_database_are_called_so(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({}), tmp_path / "a.parquet")
    assert "Parquet without columns" in refusal(config_of(tmp_path / "a.parquet"))
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as store:
        store.execute("create table rows (instruction text, output text)")
    assert "SQLite" in refusal(config_of(tmp_path / "a.db"))


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["bare", "mark"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_the_encoding_is_named_and_the_command_for_it_helps(tmp_path: Path, encoding: str, mark: str) -> None:
    path = written(tmp_path / "rows in.jsonl", (mark + LINES.decode()).encode(encoding))
    _, _, command = refusal(config_of(path)).partition("\n")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert file_rows(config_of(tmp_path / "rows.jsonl")).rows == AS_ROWS


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_what_never_ends_is_not_begun(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "rows.jsonl")
    assert "pipe or a device" in refusal(config_of(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("path", ["x" * 5000, "a/" * 3000, "good\0.jsonl", "nowhere.jsonl"])
def test_a_path_that_no_file_has_is_no_such_file(path: str) -> None:
    assert "no such file" in refusal(config_of(Path(path)))


def test_a_pattern_leads_to_the_folder() -> None:
    assert "give the folder" in refusal(config_of(Path("rows/*.jsonl")))


def many(folder: Path, name: str, count: int) -> Path:
    rows = [{"instruction": f"{name} {number}", "output": "x"} for number in range(count)]
    return written(folder / f"{name}.jsonl", "\n".join(map(json.dumps, rows)))


def of(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row.prompt[0].text.startswith(name)]


@pytest.mark.parametrize(
    ("weights", "limit", "used"),
    [
        ((None, None), None, (100, 60)),
        ((0.7, 0.3), None, (100, 42)),
        ((1, 3), None, (20, 60)),
        ((1, 1), 20, (10, 10)),
        ((None, None), 16, (10, 6)),
    ],
)
def test_sources_are_drawn_by_weight_and_no_row_twice(
    tmp_path: Path, weights: tuple[float | None, ...], limit: int | None, used: tuple[int, int]
) -> None:
    names = ("a", "b")
    paths = [many(tmp_path, name, count) for name, count in zip(names, (100, 60), strict=True)]
    sources = [SourceConfig(path=str(path), weight=weight) for path, weight in zip(paths, weights, strict=True)]
    found = file_rows(config_of(sources=sources, rows=limit))
    assert tuple(len(of(found.rows, name)) for name in names) == used
    assert len(set(found.rows)) == sum(used)
    assert found.rows == by_content(found.rows) == file_rows(config_of(sources=sources[::-1], rows=limit)).rows
    for name, count in zip(names, used, strict=True):
        assert f"{count} of {100 if name == 'a' else 60} rows of {tmp_path / name}.jsonl" in found.remarks[-1]


def test_held_out_rows_come_from_the_sources_as_those_to_train_on_do(tmp_path: Path) -> None:
    """Of the large one few rows are drawn. Of 60 held-out rows 6 are expected from it: 18 are four sigmas off."""
    paths = [many(tmp_path, "a", 540), many(tmp_path, "b", 3000)]
    sources = [SourceConfig(path=str(path), weight=weight) for path, weight in zip(paths, (0.9, 0.1), strict=True)]
    rows = file_rows(config_of(sources=sources)).rows
    held = [rows[place] for place in heldout_indices(rows, 0.1)]
    assert len(held) == 60
    assert 1 <= len(of(held, "b")) <= 18


def test_a_source_that_grew_leaves_most_drawn_rows_as_they_were(tmp_path: Path) -> None:
    sources = [SourceConfig(path=str(many(tmp_path, name, 50)), weight=1) for name in ("a", "b")]
    before = of(file_rows(config_of(sources=sources, rows=40)).rows, "a")
    many(tmp_path, "a", 55)
    after = of(file_rows(config_of(sources=sources, rows=40)).rows, "a")
    assert len(before) == len(after) == 20
    assert len(set(before) & set(after)) >= 15


def test_a_source_named_twice_and_one_that_would_not_be_used_are_refused(tmp_path: Path) -> None:
    paths = [str(many(tmp_path, name, count)) for name, count in (("a", 100), ("b", 1))]
    assert "no row is used twice" in refusal(config_of(sources=[SourceConfig(path=paths[0])] * 2))
    sources = [SourceConfig(path=path, weight=weight) for path, weight in zip(paths, (1, 1000), strict=True)]
    assert "a.jsonl would be used" in refusal(config_of(sources=sources))


def test_rows_of_the_held_out_file_are_not_trained_on(tmp_path: Path) -> None:
    path, apart = many(tmp_path, "a", 10), many(tmp_path, "b", 3)
    with apart.open("a") as file:
        file.write("\n" + path.read_text().partition("\n")[0])
    data = config_of(path, heldout_path=str(apart))
    chosen = selected(data)
    assert (len(chosen.rows), len(chosen.heldout), chosen.in_both) == (9, 4, 1)
    assert not set(chosen.rows) & set(chosen.heldout)
    assert chosen.heldout == by_content(chosen.heldout)
    check_rows(data, 9)
    with pytest.raises(InvalidInput, match=r"has 9 rows that data\.heldout_path does not hold"):
        check_rows(data, 10)
    data.heldout_path = str(path)
    with pytest.raises(InvalidInput, match="holds every row"):
        selected(data)
    data.heldout_path = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(InvalidInput, match=r"data\.heldout_path=.*no such file"):
        check_rows(data, 1)


def test_equal_rows_of_the_held_out_file_are_counted_and_dropped_when_asked(tmp_path: Path) -> None:
    path, apart = many(tmp_path, "a", 10), many(tmp_path, "b", 3)
    apart.write_text(f"{apart.read_text()}\n{apart.read_text()}")
    data = config_of(path, heldout_path=str(apart))
    kept = selected(data)
    assert (len(kept.heldout), kept.repeated, kept.dropped) == (6, 3, 0)
    data.duplicates = Duplicates.exact
    dropped = selected(data)
    assert (len(dropped.heldout), dropped.repeated, dropped.dropped) == (3, 3, 3)


@pytest.mark.parametrize(("layout", "said"), [("auto", "too"), ("instruct", "same data.layout")])
def test_held_out_rows_of_another_layout_are_refused(tmp_path: Path, layout: str, said: str) -> None:
    apart = written(tmp_path / "text.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    path = many(tmp_path, "a", 10)
    data = config_of(path, heldout_path=str(apart), layout=Layout[layout])
    with pytest.raises(InvalidInput, match=said) as refusal:
        check_rows(data, 1)
    assert "text.jsonl" in str(refusal.value)
    both = config_of(heldout_path=str(apart), sources=[SourceConfig(path=str(path)), SourceConfig(path=str(apart))])
    assert len(selected(both).heldout) == 2, "they are like some of the rows to train on"


def test_a_single_chat_is_a_row_and_no_list_of_rows(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = written(tmp_path / "rows.jsonl", json.dumps(chat))
    assert file_rows(config_of(path)).rows == [Conversation.of("q", "a")]
    assert "jq -c . " in refusal(config_of(written(path, json.dumps(chat, indent=1))))


def test_what_nearly_equals_a_held_out_row_is_a_near_duplicate(tmp_path: Path) -> None:
    texts = [" ".join(f"word{number * word}" for word in range(1, 30)) for number in range(1, 6)]
    path, apart = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    written(path, "\n".join(json.dumps({"text": text.upper()}) for text in texts))
    written(apart, "\n".join(json.dumps({"text": text}) for text in texts[:2]))
    data = config_of(path, heldout_path=str(apart), duplicates=Duplicates.near)
    chosen = selected(data)
    assert (len(chosen.rows), len(chosen.heldout)) == (3, 2)
    assert (chosen.near_repeated, chosen.dropped, chosen.in_both) == (2, 2, 0)


def test_rows_that_are_dropped_do_not_count_as_enough(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", "\n".join([*map(json.dumps, ROWS), json.dumps(ROWS[0])]))
    check_rows(config_of(path, holdout=0.2), 3)
    with pytest.raises(InvalidInput, match="has 3 rows, 2 after"):
        check_rows(config_of(path, holdout=0.2, duplicates=Duplicates.exact), 3)


def test_the_points_of_a_sweep_read_their_rows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[DataConfig] = []

    def counted(data: DataConfig, keep: Callable[[Row], None]) -> Found[None]:
        read.append(data)
        return read_rows(data, keep)

    monkeypatch.setattr("lora_lab.dataset.selection.read_rows", counted)
    path = many(tmp_path, "a", 10)
    for needed in (1, 9):
        check_rows(config_of(path), needed)
    with pytest.raises(InvalidInput, match="has 10 rows, 9 after"):
        check_rows(config_of(path), 10)
    assert len(read) == 1
    check_rows(config_of(path, holdout=0.2), 8)
    many(tmp_path, "a", 20)
    check_rows(config_of(path), 18)
    assert len(read) == 3
