"""The digests of the code: they change with what can change a figure, and with nothing else."""

import ast
import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_lab.config import TrialConfig
from lora_lab.placement import Placement
from lora_lab.store import code_digest, environment, fingerprint
from lora_lab.store.code_digest import deciding_files, telemetry_digest
from lora_lab.sweep import resuming


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of this package, whose digests are asked for."""
    copy = tmp_path / "lora_lab"
    shutil.copytree(code_digest.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code_digest, "PACKAGE", copy)
    monkeypatch.setattr(code_digest, "_tree", lambda path: parsed(path.read_bytes()))
    yield copy
    forget()


parsed = functools.cache(ast.parse)
"""As often as a file's content is seen: parsing is most of what a digest takes, and few files change between two."""


def forget() -> None:
    code_digest._imported.cache_clear()


def digests() -> tuple[str, str]:
    forget()
    return code_digest.code_digest(), telemetry_digest()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.search(old, text), f"{path} has no {old}"
    path.write_text(re.sub(old, new, text, count=1), encoding="utf-8")


FOR_PEOPLE = {
    "a docstring": (r'^"""', '"""Other words. '),
    "a docstring within": (r'\n    """', '\n    """Other words. '),
    "a comment": (r"\Z", "\n# another word\n"),
    "layout": (r"\n\n\n", "\n\n\n\n\n"),
}


def test_what_only_people_read_changes_no_digest(package: Path) -> None:
    before = digests()
    for file in ("worker/training.py", "config.py", "telemetry/summary.py"):
        for words in FOR_PEOPLE.values():
            change(package / file, *words)
    assert digests() == before


RUNS = (*("worker/engines/graph_step.py", "worker/new.py", "config.py", "trial/variables.py"),)
FIGURES = ("telemetry/summary.py", "store/record.py")
NEITHER = (
    *("report/findings.py", "trial/display.py", "sweep/sweeper.py", "trial/session.py"),
    "composition/validation.py",
)


@pytest.mark.nightly
def test_another_line_of_code_changes_the_digest_of_what_it_decides(package: Path) -> None:
    before = digests()
    for files in (NEITHER, *((file,) for file in (*FIGURES, *RUNS))):
        for file in files:
            with (package / file).open("a", encoding="utf-8") as opened:
                opened.write("\nANOTHER = 1\n")
        now = digests()
        assert (now[0] != before[0], now[1] != before[1]) == (files[0] in RUNS, files[0] in FIGURES), files
        before = now


def test_what_a_worker_begins_to_import_counts_too(package: Path) -> None:
    change(package / "worker" / "training.py", r"\Z", "\n\ndef f():\n    from lora_lab import idle_thoughts\n")
    (package / "idle_thoughts.py").write_text("A = 1\n")
    before = digests()
    (package / "idle_thoughts.py").write_text("A = 2\n")
    assert digests()[0] != before[0]


def test_uncommitted_are_only_changes_in_what_decides_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    top = str(environment.PACKAGE.parent)
    monkeypatch.setattr(environment, "_git", lambda *words: asked.append(words) or top)
    environment._commit()
    [status] = [words for words in asked if words[0] == "status"]
    named = {str(path.relative_to(environment.PACKAGE)) for path in map(Path, status[status.index("--") + 1 :])}
    assert {"worker/trial.py", "config.py", "telemetry/summary.py"} <= named
    assert not {name for name in named if name.startswith(("report", "display", "session"))}
    assert len(named) == len(deciding_files())


def test_other_figures_of_the_same_measurement_are_no_other_trial_and_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, facts = fingerprint.conditions(TrialConfig(), Placement()), environment.environment()
    then: Any = SimpleNamespace(read=lambda: SimpleNamespace(record=SimpleNamespace(tags=facts)))
    resuming._warn_of_other_figures(then)
    assert capsys.readouterr().err == ""
    for module in (fingerprint, resuming):
        monkeypatch.setattr(module, "environment", lambda: {**facts, "code.telemetry": "newer"})
    assert fingerprint.conditions(TrialConfig(), Placement()) == before
    resuming._warn_of_other_figures(then)
    assert "-> newer" in capsys.readouterr().err
