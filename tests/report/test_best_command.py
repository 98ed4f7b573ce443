"""python -m lora_lab.best on a store, end to end."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from planted import record, trial

from benchmarks.compose import compose
from lora_lab import best
from lora_lab.config import TrackingConfig
from lora_lab.report.measures import ENERGY, HOURS, THROUGHPUT, VRAM
from lora_lab.store.mlflow_store import open_tracker
from lora_lab.store.record import Record


def figures(rate: float, gib: float) -> dict[str, float]:
    return {THROUGHPUT.key: rate, ENERGY.key: 100 / rate, VRAM.key: gib}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sweep of two points with two repeats, and an older window and job of another model."""
    root = tmp_path_factory.mktemp("best")
    tracker = open_tracker(TrackingConfig(root=str(root)))
    whole = figures(7000.0, 1.0) | {HOURS.key: 2.0}
    tracker.deliver(record(trial(whole, sweep=None, model="smollm2_135m", train__epochs="3.0")), [])
    small = trial(figures(5000.0, 1.0), sweep=None, model="smollm2_135m")
    sweep = Record(
        id="a" * 32,
        is_sweep=True,
        name="sweep of batch_size",
        params={"points": "2", "trials": "4"},
        outcome="finished",
        tags={"outcome": "finished"},
    )
    tracker.deliver(record(small), [])
    tracker.deliver(sweep, [])
    for batch, rate, gib in (("1", 1000.0, 6.0), ("2", 1500.0, 9.0)):
        for repeat in range(2):
            one = trial(figures(rate + repeat, gib), sweep=sweep.id, repeat=repeat, batch_size=batch)
            tracker.deliver(record(dataclasses.replace(one, started_ms=one.started_ms + 10_000)), [])
    return f"sqlite:///{root}/mlflow.db"


def run(store: str, capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> tuple[int, str, str]:
    code = best.main([*arguments, "--store", store])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


def test_it_answers_within_the_budget(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(store, capsys, ["--vram", "8", "--objective", "energy"])
    assert code == 0
    assert "0.1000 J/token" in out
    assert "batch_size=1" in out
    assert "1 configuration beyond 8 GiB" in out
    code, out, _ = run(store, capsys, [])
    assert code == 0
    assert "1,500 tokens/s" in out
    assert "--model smollm2_135m" in out


def test_model_and_sweep_choose(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "5,000 tokens/s" in run(store, capsys, ["--model", "smollm2_135m"])[1]
    code, out, _ = run(store, capsys, ["--sweep", "aaaaaaaa"])
    assert code == 0
    assert "smollm2" not in out


def test_codes_for_nothing_that_fits_and_for_what_cannot_be_told(
    store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(store, capsys, ["--vram", "4"])
    assert code == 1
    assert "6.00 GiB" in out
    assert "vram_limit_gib=4" in out
    assert "--shipped" in out
    code, _, err = run(store, capsys, ["--card", "4060"])
    assert code == 2
    assert "H100" in err
    code, _, err = run(store, capsys, ["--sweep", "bbbb"])
    assert code == 2
    monkeypatch.chdir(tmp_path)
    assert best.main(["--model", "no_such_model"]) == 2
    assert "there is no store" in capsys.readouterr().err


def test_a_fresh_clone_answers_from_the_shipped_records(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    assert best.main(["--vram", "12"]) == 0
    assert time.perf_counter() - began < 3
    said = capsys.readouterr()
    assert "no trials of your own" in said.err
    assert "no store" not in said.err  # nothing is wrong
    command = next(line for line in said.out.splitlines() if line.startswith("    lora-lab "))
    config = compose(command.split()[1:])
    assert config.gradient_checkpointing is not None
    assert " ".join(said.out.split()).endswith("data=random_tokens.")  # the doubt comes last
    assert best.main(["--vram", "1"]) == 1


def test_trials_of_ones_own_are_asked_first_unless_told_otherwise(
    store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns").symlink_to(Path(store.removeprefix("sqlite:///")).parent)
    assert best.main(["--vram", "8"]) == 0
    assert "0.1000 J/token" in capsys.readouterr().out
    assert best.main(["--vram", "8", "--shipped"]) == 0
    assert "lora-lab model=" in capsys.readouterr().out
    with_loss = ["--vram", "8", "--max-loss-increase", "1%"]
    assert best.main(with_loss) == 2  # neither has it: both reasons are given
    assert capsys.readouterr().err.count("--max-loss-increase cannot be applied") == 2


@pytest.mark.parametrize(
    "arguments",
    [["--vram", "0"], ["--vram", "8 GB"], ["--max-loss-increase", "-1%"], ["--objective", "speed"], ["--hours", "0"]],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        best.main(arguments)
    assert left.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_jobs_and_windows_of_one_store_are_answered_apart(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(store, capsys, ["--model", "smollm2_135m"])
    assert code == 0
    assert "5,000 tokens/s" in out, "the newest trial is a window"
    assert "7,000" not in out
    assert "--kind job" in out
    for asked in (["--kind", "job"], ["--hours", "2"], ["--objective", "hours"]):
        code, out, _ = run(store, capsys, asked)
        assert code == 0
        assert "7,000 tokens/s" in out
        assert "--kind window" in out
    code, out, _ = run(store, capsys, ["--hours", "1.5"])
    assert code == 1
    assert "takes least: 2 h" in out


def test_windows_have_no_hours(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        best.main(["--kind", "window", "--hours", "3"])
    assert left.value.code == 2
    assert "only jobs" in capsys.readouterr().err
    code, _, err = run(store, capsys, ["--objective", "kwh", "--model", "qwen2_5_1_5b"])
    assert code == 2
    assert "no job" in err
