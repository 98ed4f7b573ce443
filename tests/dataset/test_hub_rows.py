"""Rows of a data set: the package datasets on folders, which it reads as it does the hub's."""

import json
from pathlib import Path

import pytest
from datasets.exceptions import DatasetNotFoundError

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig, SourceConfig
from lora_lab.dataset.row import Conversation, Passage, Row
from lora_lab.dataset.selection import check_rows
from lora_lab.dataset.sources import read_rows
from lora_lab.options import DataSource

ROW = {"instruction": "Why?", "output": "Because."}
CONFIGS = "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n---\n"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def data_set(folder: Path, **files: str | list[dict[str, object]]) -> DataConfig:
    (folder / "set").mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (folder / "set" / name.replace("_", ".")).write_text(text)
    return DataConfig(source=DataSource.hub, id=str(folder / "set"))


def hub_rows(data: DataConfig) -> tuple[list[Row], int]:
    found = read_rows(data, lambda row: row)
    return found.rows, found.empty


def test_rows_come_with_the_empty_answers_counted(tmp_path: Path) -> None:
    data = data_set(tmp_path, train_jsonl=[ROW, ROW | {"output": " "}, ROW, ROW])
    assert hub_rows(data) == ([Conversation.of("Why?", "Because.")] * 3, 1)
    data.rows = 2
    assert hub_rows(data) == ([Conversation.of("Why?", "Because.")], 1)


def test_configuration_and_split_are_chosen(tmp_path: Path) -> None:
    files = {
        "README_md": CONFIGS.replace("a.jsonl", "\n  - split: test\n    path: t.jsonl"),
        "t_jsonl": [ROW],
        "b_jsonl": [ROW, ROW],
    }
    data = data_set(tmp_path, **files)
    data.config, data.split = "one", "test"
    assert len(hub_rows(data)[0]) == 1
    data.config, data.split = "two", None
    assert len(hub_rows(data)[0]) == 2
    data.config = "three"
    with pytest.raises(InvalidInput, match=r"no configuration three \(it has 'one', 'two'\)"):
        hub_rows(data)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"test_jsonl": [ROW]}, ["has no split train", "'test'", "data.split=NAME"]),
        (
            {"README_md": CONFIGS, "a_jsonl": [ROW], "b_jsonl": [ROW]},
            ["several configurations", "'one', 'two'", "data.config=NAME"],
        ),
        ({"set_py": "x = 1\n"}, ["is a script"]),
        ({}, ["could not be loaded", "data=lab_qa"]),
        ({"a_jsonl": '{"instr'}, ["could not be loaded", "JSON parse error"]),
        ({"a_jsonl": [ROW], "b_jsonl": [ROW | {"more": 1}]}, ["could not be loaded", "CastError"]),
        ({"a_parquet": "version https://git-lfs.github.com/spec/v1\n"}, ["could not be loaded", "Parquet"]),
        (
            {"train_jsonl": [{"q": "Why?", "a": "So."}]},
            ["no layout has the columns found: q, a", "data.map={instruction: q, output: a}"],
        ),
        (
            {"train_jsonl": [ROW, ROW | {"input": [1]}, ROW | {"input": [2]}]},
            ["2 broken row(s)", "rows 2, 3: input must be text"],
        ),
    ],
    ids=["split", "configurations", "script", "empty", "torn", "unlike", "lfs", "columns", "list"],
)
def test_what_datasets_stumbles_over_is_one_refusal(
    tmp_path: Path, files: dict[str, str | list[dict[str, object]]], words: list[str]
) -> None:
    data = data_set(tmp_path, **files)
    with pytest.raises(InvalidInput) as info:
        hub_rows(data)
    assert [word for word in words if word not in str(info.value)] == [], str(info.value)
    assert f"data.id={data.id}" in str(info.value)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "Dataset 'me/mine' is a gated dataset on the Hub.",
            ["is gated", "huggingface.co/datasets/me/mine", "hf auth login"],
        ),
        ("Revision 'x' doesn't exist for dataset 'me/mine' on the Hub.", ["no revision", "data.revision"]),
        (
            "Dataset 'me/mine' doesn't exist on the Hub or cannot be accessed.",
            ["could not be loaded", "Check the name"],
        ),
    ],
    ids=["gated", "revision", "no_such"],
)
def test_what_the_hub_says_is_one_refusal(monkeypatch: pytest.MonkeyPatch, said: str, words: list[str]) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise DatasetNotFoundError(said)

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(InvalidInput) as info:
        hub_rows(DataConfig(source=DataSource.hub, id="me/mine"))
    assert [word for word in words if word not in str(info.value)] == [], str(info.value)


def test_a_data_set_may_be_one_of_several_sources(tmp_path: Path) -> None:
    name = data_set(tmp_path, train_jsonl=[ROW | {"output": f"{n}"} for n in range(10)] + [ROW | {"output": ""}]).id
    (tmp_path / "own.jsonl").write_text('{"text": "Once."}\n{"text": "Twice."}\n')
    sources = [SourceConfig(id=name, weight=3), SourceConfig(path=str(tmp_path / "own.jsonl"), weight=1)]
    data = DataConfig(source=DataSource.file, sources=sources)
    found = read_rows(data, lambda row: row)
    assert [isinstance(row, Passage) for row in found.rows].count(True) == 2
    assert len(found.rows) == 8
    assert found.remarks[-1] == f"data.sources: 6 of 10 rows of {name}; 2 of 2 rows of {sources[1].path} are used"
    assert "1 row(s) without an answer" in found.remarks[0]
    check_rows(data, 1000)  # the parent process does not read it
    sources[0].split = "test"
    with pytest.raises(InvalidInput, match=r"data\.sources\.id=.* no split test.*split: NAME in data\.sources"):
        read_rows(data, lambda row: row)
    data.sources = [sources[0], sources[0]]
    with pytest.raises(InvalidInput, match="no row is used twice"):
        read_rows(data, lambda row: row)
