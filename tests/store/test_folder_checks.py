"""Where a trial or sweep may leave its files, and what of them goes into the store."""

from pathlib import Path

import pytest
from conftest import Lab, store_of

from lora_lab.config import InvalidInput, TrackingConfig
from lora_lab.options import TrackingKind
from lora_lab.paths import MULTIRUN
from lora_lab.store.folder_checks import check_chdir, check_sweep_folder, check_trial_folder, check_working_folder
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Record
from lora_lab.store.sweep_folder import PLAN, Plan, Planned, SweepFolder
from lora_lab.store.trial_folder import LEFT_OVER, TrialFolder

CHEAP = ("model=tiny", "measure=quick", "data=random_tokens", "seq_len=32")
LOCAL = TrackingConfig(root="mlruns")
NONE = TrackingConfig(kind=TrackingKind.none)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a store."""
    (tmp_path / "mlruns").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(folder: Path, of_sweep: bool) -> None:
    if of_sweep:
        check_sweep_folder(folder, LOCAL)
    else:
        check_trial_folder(folder, LOCAL, in_sweep=False)


@pytest.mark.parametrize(
    "name", [".", "..", "mlruns", "mlruns/x", "mlruns/artifacts/1", "./mlruns/../mlruns/x", "multirun/../mlruns", "/"]
)
@pytest.mark.parametrize("of_sweep", [False, True])
def test_a_folder_and_the_store_may_not_lie_within_each_other(here: Path, name: str, of_sweep: bool) -> None:
    (here / "multirun").mkdir()
    with pytest.raises(InvalidInput, match=r"MLflow store .*hydra\.(run|sweep)\.dir=FOLDER"):
        refuse(Path(name), of_sweep)


def test_links_are_followed_to_where_they_lead(here: Path) -> None:
    (here / "inside").symlink_to(here / "mlruns", target_is_directory=True)
    (here / "around").symlink_to(here, target_is_directory=True)
    for name in ("inside", "inside/x", "around"):
        with pytest.raises(InvalidInput, match="MLflow store"):
            check_trial_folder(Path(name), LOCAL, in_sweep=False)
    linked = TrackingConfig(root="elsewhere")
    (here / "elsewhere").symlink_to(here / "mlruns", target_is_directory=True)
    with pytest.raises(InvalidInput, match="MLflow store"):
        check_trial_folder(Path("mlruns/x"), linked, in_sweep=False)


@pytest.mark.parametrize("name", ["mlruns2", "mlruns-x/y", "multirun/2026-01-01/10-00-00", "new", "deep/er/new"])
def test_a_folder_with_a_name_like_the_stores_is_another(here: Path, name: str) -> None:
    check_trial_folder(Path(name), LOCAL, in_sweep=False)
    check_sweep_folder(Path(name), LOCAL)
    (here / name).mkdir(parents=True)
    check_trial_folder(Path(name), LOCAL, in_sweep=False)


@pytest.mark.parametrize(
    "name", ["notes.txt", "config.yaml", "trial.json", "record.json", PLAN, ".git", "adapter", "delivered.json", "0000"]
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_folder_that_holds_anything_else_is_refused(here: Path, name: str, as_folder: bool) -> None:
    (here / "mine").mkdir()
    (here / "mine" / name).mkdir() if as_folder else (here / "mine" / name).touch()
    for tracking in (LOCAL, NONE):
        with pytest.raises(InvalidInput, match="holds"):
            check_trial_folder(Path("mine"), tracking, in_sweep=False)


def test_what_a_refused_start_leaves_is_in_nobodys_way(here: Path) -> None:
    (here / "mine").mkdir()
    for name in LEFT_OVER:
        (here / "mine" / name).touch()
    check_trial_folder(Path("mine"), LOCAL, in_sweep=False)


@pytest.mark.parametrize("what", ["file", "dangling link", "link loop", "link to a file"])
@pytest.mark.parametrize("of_sweep", [False, True])
def test_what_is_no_folder_is_refused(here: Path, what: str, of_sweep: bool) -> None:
    put_in_the_way(here / "mine", what)
    with pytest.raises(InvalidInput, match="mine"):
        refuse(Path("mine"), of_sweep)


@pytest.mark.parametrize("what", ["file", "dangling link", "link loop", "link to a file"])
def test_something_in_the_way_of_multirun_is_named(here: Path, what: str) -> None:
    check_working_folder()
    put_in_the_way(here / MULTIRUN, what)
    with pytest.raises(InvalidInput, match="multirun"):
        check_working_folder()


def put_in_the_way(path: Path, what: str) -> None:
    if what == "file":
        path.touch()
    elif what == "link to a file":
        path.with_name("target").touch()
        path.symlink_to(path.with_name("target"))
    else:
        path.symlink_to(path if what == "link loop" else path.with_name("nowhere"))


def test_hydras_variable_in_the_working_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a${c}b").mkdir()
    monkeypatch.chdir(tmp_path / "a${c}b")
    with pytest.raises(InvalidInput, match="Hydra reads as a variable"):
        check_working_folder()


def test_a_name_with_control_characters_is_refused(here: Path) -> None:
    with pytest.raises(InvalidInput, match="control characters"):
        check_trial_folder(Path("a\nb"), LOCAL, in_sweep=False)


@pytest.mark.parametrize("name", [PLAN, "trials.csv", "report.html", "0000", "0003-2", "2024-data", "trial.json"])
def test_a_sweep_takes_no_folder_in_which_its_own_names_are_taken(here: Path, name: str) -> None:
    (here / "mine" / name).mkdir(parents=True)
    with pytest.raises(InvalidInput, match=r"hydra\.sweep\.dir=FOLDER"):
        check_sweep_folder(Path("mine"), LOCAL)


def test_a_sweeps_folder_may_hold_other_files_of_the_users(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").touch()
    check_sweep_folder(Path("mine"), LOCAL)


def sweep_plan() -> Plan:
    """Of two trials."""
    trials = [
        Planned(number=n, settings={}, asked_place=n, repeat=0, overrides=[], point="p", fingerprint="f")
        for n in (0, 1)
    ]
    record = Record(name="a sweep", params={}, tags={}, is_sweep=True)
    return Plan(owner=this_process(), tracking=NONE, record=record, conditions={}, trials=trials)


@pytest.mark.parametrize("in_sweep", [False, True])
def test_only_what_a_sweep_launches_is_counted_among_its_trials(here: Path, in_sweep: bool) -> None:
    """A trial of other settings would stand under a planned one's. A sweep says of each trial that it launches it."""
    SweepFolder(here / "sw").write(sweep_plan())
    with pytest.raises(InvalidInput, match=r"sweep's folder.*=FOLDER"):
        check_trial_folder(here / "sw" / "0001", NONE, in_sweep)
    check_trial_folder(here / "sw" / "0001", NONE, in_sweep=True, planned=True)


@pytest.mark.parametrize("name", ["mine/x", "mine/adapter/x", "mine/adapter/deep/er", "link/x"])
@pytest.mark.parametrize("of_sweep", [False, True])
def test_no_folder_lies_in_another_trials(here: Path, name: str, of_sweep: bool) -> None:
    """That one's adapter goes into the store whole."""
    (here / "mine" / "adapter").mkdir(parents=True)
    (here / "link").symlink_to(here / "mine" / "adapter", target_is_directory=True)
    (here / "mine" / "trial.json").touch()
    refuse(Path(name), of_sweep)  # a file of the user's that happens to be called so
    (here / "mine" / "events.jsonl").touch()
    with pytest.raises(InvalidInput, match=r"another trial.*=FOLDER"):
        refuse(Path(name), of_sweep)


@pytest.mark.parametrize("of_sweep", [False, True])
def test_hydras_variable_in_a_folders_name_is_refused(here: Path, of_sweep: bool) -> None:
    with pytest.raises(InvalidInput, match="Hydra reads as a variable"):
        refuse(here / "a${c}b", of_sweep)
    refuse(here / "a$c{b}", of_sweep)


def test_changing_into_the_trials_folder_is_refused() -> None:
    check_chdir(None)
    check_chdir(False)
    with pytest.raises(InvalidInput, match=r"hydra\.job\.chdir"):
        check_chdir(True)


def test_only_what_a_trial_writes_goes_into_the_store(tmp_path: Path) -> None:
    for name in ("notes.txt", "config.yaml", "adapter", "record.json", "mlruns", ".hidden", "events.jsonl"):
        (tmp_path / name).mkdir() if name in ("adapter", "mlruns") else (tmp_path / name).touch()
    (tmp_path / "worker.log").symlink_to("/etc/hostname")
    assert [path.name for path in TrialFolder(tmp_path).artifacts()] == ["adapter", "config.yaml", "events.jsonl"]


def test_a_folder_of_the_users_is_used_once_and_its_run_is_whole(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("private")
    for place in ("hydra.run.dir=.", "hydra.run.dir=mlruns/x", "hydra.job.chdir=true"):
        said = lab(*CHEAP, place)
        assert (said.code, "Refused" in said.err, "Traceback" in said.text) == (2, True, False), said.text
    assert lab(*CHEAP, "hydra.run.dir=mine").code == 0
    written = (tmp_path / "mine" / "record.json").read_bytes()
    again = lab(*CHEAP, "hydra.run.dir=mine")
    assert (again.code, "holds a trial already" in again.err) == (2, True), again.text
    assert (tmp_path / "mine" / "record.json").read_bytes() == written
    client, [run] = store_of(tmp_path)
    assert run.info.status == "FINISHED"
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept == {"adapter", "config.yaml", "environment.json", "events.jsonl", "samples.jsonl", "seen.json"} | {
        "summary.json",
        "trial.json",
        "weights.json",
        "worker.log",
    }
    assert sum(path.stat().st_size for path in (tmp_path / "mlruns").rglob("*") if path.is_file()) < 20e6
