"""Where a trial's own files are found when its folder is used from another place than it was started in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from benchmarks.compose import compose
from lora_lab.composition.compose import stored_config
from lora_lab.options import DataSource


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A folder in which a trial of a relative path was started; the trial's own folder lies below."""
    (tmp_path / "there" / "multirun" / "day" / "time").mkdir(parents=True)
    (tmp_path / "there" / "rows.jsonl").touch()
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "there"


def write(started: Path, **data: Any) -> Path:
    file = started / "multirun" / "day" / "time" / "config.yaml"
    config = compose(["model=tiny"])
    config.data = replace(config.data, **{"source": DataSource.file, **data})
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return file


def test_a_relative_path_is_found_from_the_trials_own_folder(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(started, path="rows.jsonl", heldout_path="rows.jsonl")
    monkeypatch.chdir(started)
    assert stored_config(file).data.path == "rows.jsonl", "as typed where it leads somewhere"
    monkeypatch.chdir(started.parent / "elsewhere")
    found = stored_config(file).data
    assert found.path == found.heldout_path == str(started / "rows.jsonl")


def test_what_is_nowhere_stays_as_typed(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(started.parent / "elsewhere")
    for path in ("gone.jsonl", str(started / "gone.jsonl")):
        assert stored_config(write(started, path=path)).data.path == path


def test_a_shipped_name_is_no_path(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (started / "lab_chat.jsonl").touch()
    monkeypatch.chdir(started.parent / "elsewhere")
    file = write(started, path="lab_chat.jsonl", source=DataSource.shipped)
    assert stored_config(file).data.path == "lab_chat.jsonl"
