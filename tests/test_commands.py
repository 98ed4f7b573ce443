import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Lab

from lora_lab import __main__ as command_line
from lora_lab import __version__, completion, ui
from lora_lab.commands import COMMANDS, meant
from lora_lab.config import TrackingConfig
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.store.mlflow_store import open_tracker
from lora_lab.store.record import Record


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["lora-lab", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        command_line.main()
    return left.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, command, "--help") == 0
    assert "usage:" in capsys.readouterr().out


def test_the_help_names_every_command() -> None:
    from lora_lab.composition.compose import CONF

    text = (CONF / "hydra" / "help" / "lora_lab.yaml").read_text()
    assert all(f"lora-lab {command}" in text for command in ["run", *COMMANDS])


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A store with one run, where the user stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_store, tmp_path / "mlruns")
    open_tracker(TrackingConfig()).deliver(Record(name="tiny", params={}, tags={}, outcome="finished"), [])
    return tmp_path


def test_ui_says_where_the_trials_are_and_listens_on_this_machine_alone(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: started.append(words))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ui, "_PORT", port)
        ui.main([])
    [words] = started
    assert words[words.index("--host") + 1] == "127.0.0.1"
    chosen = int(words[words.index("--port") + 1])
    assert port < chosen < port + 100, "somebody listens at the first"
    assert f"http://127.0.0.1:{chosen}/#/experiments/1/runs?viewStateShareKey=lora_lab" in capsys.readouterr().out


def test_ui_without_a_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ui.main([]) == EXIT_REFUSED
    assert "there is no store" in capsys.readouterr().err


def test_a_shell_completes_commands_and_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main(["bash"]) == 0
    script = capsys.readouterr().out.replace('eval "$(lora-lab -sc install=bash)"', "")
    fake = 'hydra_bash_completion() { COMPREPLY=("asked: $COMP_LINE $COMP_CWORD"); }\n'
    typed = {
        "rep": ("lora-lab rep", 1, "report"),
        "run": ("lora-lab run model=t", 2, "asked: lora-lab model=t 1"),
        "setting": ("lora-lab model=tiny opt", 2, "asked: lora-lab model=tiny opt 2"),
    }
    for line, place, wanted in typed.values():
        words = " ".join(f"'{word}'" for word in line.split())
        ask = f"COMP_LINE='{line}'; COMP_WORDS=({words}); COMP_CWORD={place}; _lora_lab; echo \"${{COMPREPLY[*]}}\"\n"
        done = subprocess.run(["bash", "-c", fake + script + ask], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted, done.stderr


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("repot", "report"),
        ("bst", "best"),
        ("recompte", "recompute"),
        ("batch_size=2", ""),
        ("--help", ""),
        ("xyz", ""),
    ],
)
def test_a_mistyped_command_is_recognised_and_nothing_else(word: str, near: str) -> None:
    assert meant(word) == near


def test_run_is_the_command_line_of_a_trial_and_a_typo_is_not(lab: Lab) -> None:
    for words in (["run", "optimiser=adamw"], ["optimiser=adamw"]):
        said = lab(*words)
        assert (said.code, "Did you mean optimizer" in said.err) == (EXIT_REFUSED, True), said.text
    said = lab("repot")
    assert (said.code, "Did you mean report?" in said.err) == (EXIT_REFUSED, True), said.text


def test_the_version_is_the_projects_own_not_hydras(lab: Lab) -> None:
    assert lab("--version").out.split() == ["lora_lab", __version__]
