"""The command line of benchmarks.engine_losses: what can't be meant is told before a trial of minutes begins."""

import sys

import pytest

from benchmarks.engine_losses import main


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["out", "measure.stepz=3"], "Did you mean measure.steps"),
        (["out", "--without", "ligr"], "choose from"),
        ([], "out"),
    ],
)
def test_a_mistake_is_told(
    typed: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["engine_losses", *typed])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
