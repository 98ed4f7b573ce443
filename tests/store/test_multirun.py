from pathlib import Path

import pytest

from lora_lab.paths import MULTIRUN
from lora_lab.store.multirun import LATEST, folders, point_latest


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_latest_leads_to_the_newest_and_no_folder_counts_twice() -> None:
    made = [MULTIRUN / "2026-01-01" / name for name in ("one", "two")]
    for folder in made:
        (folder / "0000").mkdir(parents=True)
        point_latest(folder)
    assert (MULTIRUN / LATEST).resolve() == made[1].resolve()
    assert not Path((MULTIRUN / LATEST).readlink()).is_absolute(), "the whole folder can be moved"
    assert sorted(folders()) == made


def test_what_a_person_has_put_there_stays() -> None:
    mine = MULTIRUN / LATEST / "notes"
    mine.mkdir(parents=True)
    point_latest(Path("elsewhere"))
    assert mine.is_dir()
    assert not (MULTIRUN / LATEST).is_symlink()


def test_a_link_that_cannot_be_made_is_no_error() -> None:
    MULTIRUN.write_text("in the way")
    point_latest(Path("elsewhere"))


def test_latest_never_leads_to_itself_and_a_real_folder_of_that_name_counts() -> None:
    folder = MULTIRUN / "2026-01-01" / "one"
    folder.mkdir(parents=True)
    point_latest(folder)
    point_latest(MULTIRUN / LATEST)
    assert (MULTIRUN / LATEST).resolve() == folder.resolve()
    (MULTIRUN / LATEST).unlink()
    (MULTIRUN / LATEST / "mine").mkdir(parents=True)
    assert MULTIRUN / LATEST / "mine" in folders()


def test_the_link_that_another_process_is_making_is_no_folder_of_trials(tmp_path: Path) -> None:
    (tmp_path / "day" / "trial").mkdir(parents=True)
    (tmp_path / ".latest.123").symlink_to("day/trial")
    (tmp_path / "latest").symlink_to("day")
    (tmp_path / "a file").touch()
    assert folders(tmp_path) == [tmp_path / "day" / "trial"]
