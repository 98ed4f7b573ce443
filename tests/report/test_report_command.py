"""python -m lora_lab.report on real stores with planted truths."""

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from planted import deliver, factorial, trial

from lora_lab.report.__main__ import main
from lora_lab.report.measures import THROUGHPUT
from lora_lab.report.statistics.contrasts import contrasts
from lora_lab.report.statistics.factors import design
from lora_lab.store.stored_runs import open_store
from lora_lab.store.trials import Trial

LEVELS = {"optimizer": ["adamw", "paged_adamw"], "precision": ["fp16", "bf16"], "shape": ["1x512", "2x512", "2x2048"]}
EFFECTS = {"optimizer=paged_adamw": math.log(1.07), "shape=2x2048": math.log(4)}
MISSING = ["precision=bf16 shape=2x512"]
OUT_OF_MEMORY = ["optimizer=adamw precision=bf16 shape=2x2048"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sweep with a 7 % effect of the optimizer under 1 % noise, none of the precision, cells missing and out of
    memory, and one trial that was killed."""
    trials = factorial(
        LEVELS, EFFECTS, noise=0.01, drift=0.2, missing=MISSING, out_of_memory=OUT_OF_MEMORY, sweep="a" * 32, random=5
    )
    trials.append(trial(outcome="killed", sweep="a" * 32, repeat=9, tags={"reason": "interrupted by Ctrl-C"}))
    return deliver(tmp_path_factory.mktemp("planted"), trials)


def run(capsys: pytest.CaptureFixture[str], store: str, *arguments: str) -> tuple[int, str, str]:
    code = main(["--store", store, *arguments])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


def test_a_planted_effect_comes_back_from_the_store(store: str) -> None:
    trials, sweeps = open_store(store).last_sweep()
    factors = design(trials, sweeps).factors
    measured = [trial for trial in trials if trial.finished]
    found = {each.factor: each.estimate for each in contrasts(measured, factors, THROUGHPUT) if each.factor != "shape"}
    assert found["optimizer"].low is not None
    assert found["optimizer"].high is not None
    assert found["optimizer"].low < math.log(1.07) < found["optimizer"].high
    assert found["optimizer"].seen
    assert not found["precision"].seen


def test_the_report_is_said_written_and_kept(store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, store, "--out", str(tmp_path / "report.html"))
    assert code == 0
    assert re.search(r"paged_adamw was [5-9]\.\d % faster than adamw", out)
    assert "o difference in speed was seen between fp16 and bf16" in out
    assert "1 out of memory" in out
    assert "Only 30 of the 31 planned trials have been run" in out
    assert "Left out: 1 trial" in out
    code, full, err = run(capsys, store, "--full", "--out", str(tmp_path / "full.html"))
    assert (code, err) == (0, "")
    assert "batch_size, seq_len, tokens per step" in full
    assert "left out: adamw fp16 1x512: killed: interrupted by Ctrl-C" in full
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "out of memory" in page
    client = MlflowClient(tracking_uri=store)
    [above] = client.search_runs(["1"], "params.points != ''")
    assert "report.html" in {file.path for file in client.list_artifacts(above.info.run_id)}
    assert above.info.status == "FINISHED"


def test_the_baseline_turns_a_contrast_round(store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "report.html")]
    assert "adamw instead of paged_adamw" in run(capsys, store, *out, "--baseline", "optimizer=paged_adamw")[1]
    code, _, err = run(capsys, store, *out, "--baseline", "optimiser=adamw")
    assert code == 2
    assert "optimizer" in err


@pytest.mark.nightly
def test_two_chosen_points_are_split(store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ends = [
        "optimizer=adamw,precision=fp16,batch_size=1,seq_len=512",
        "optimizer=paged_adamw,precision=fp16,seq_len=2048",
    ]
    arguments = ["--out", str(tmp_path / "report.html"), "--split"]
    code, out, _ = run(capsys, store, *arguments, *ends)
    assert code == 0
    assert "what made the difference from adamw fp16 1x512 to paged_adamw fp16 2x2048" in out
    # a corner between these two ran out of memory
    ends = ["optimizer=adamw,precision=bf16,seq_len=512", "optimizer=paged_adamw,precision=bf16,seq_len=2048"]
    assert "no measurement at adamw bf16 2x2048" in run(capsys, store, *arguments, *ends)[1]
    code, _, err = run(capsys, store, *arguments, "optimizer=adamw", "optimizer=lion_8bit")
    assert code == 2
    assert "lion_8bit" in err
    assert "paged_adamw fp16 2x2048" in err


def slower(trials: Sequence[Trial], share: float, sweep: str) -> list[Trial]:
    """The same trials, in another sweep, at a share of their speed."""
    return [
        dataclasses.replace(
            each,
            run_id=f"{sweep[0]}{each.run_id}",
            sweep=sweep,
            metrics={key: value * share for key, value in each.metrics.items()},
            started_ms=each.started_ms + 10**7,
        )
        for each in trials
    ]


def test_a_sweep_against_another_is_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = factorial({"optimizer": ["adamw", "paged_adamw"], "shape": ["1x512", "2x512"]}, sweep="b" * 32, random=1)
    store = deliver(tmp_path, [*before, *slower(before, 0.9, "c" * 32)])
    assert run(capsys, store, "--sweep", "cccc", "--against", "bbbb")[0] == 1
    assert run(capsys, store, "--sweep", "cccc", "--against", "bbbb", "--tolerance", "15%")[0] == 0
    assert run(capsys, store, "--sweep", "bbbb", "--against", "cccc")[0] == 0
    code, _, err = run(capsys, store, "--sweep", "bbbb", "--against", "dddd")
    assert code == 2
    assert "dddd" in err


def test_a_trial_alone_and_two_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {THROUGHPUT.key: 500.0, "vram/peak_device_gib": 6.0}
    trials = [
        trial(metrics, sweep=None),
        trial(metrics, sweep=None, unit="GPU-2"),
        trial({}, sweep=None, outcome="failed"),
    ]
    store, out = deliver(tmp_path, trials), ["--out", str(tmp_path / "report.html")]
    code, said, _ = run(capsys, store, *out, "--sweep", trials[0].run_id)
    assert code == 0
    assert "reached 500 tokens/s, 6.00 GiB" in said
    code, said, _ = run(capsys, store, *out, "--sweep", *(each.run_id for each in trials))
    assert code == 0
    assert "1 other machine or version reported separately, not averaged in" in said
    assert "Left out" in said
    code, said, _ = run(capsys, store, *out, "--sweep", trials[2].run_id)
    assert code == 0
    assert "No trial finished with figures" in said


def test_where_nothing_can_be_had_or_written(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, store, "--out", str(tmp_path / "nowhere" / "report.html"))
    assert code == 2
    assert "--out" in err
    code, _, err = run(capsys, store, "--claims", str(tmp_path / "nofile.yaml"))
    assert code == 2
    assert "there is no file" in err
    broken = tmp_path / "claims.yaml"
    broken.write_text("id: [", encoding="utf-8")
    code, _, err = run(capsys, store, "--claims", str(broken))
    assert code == 2
    assert "claims.yaml" in err
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "there is no store" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_reader_who_leaves_early_is_no_finding(store: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lora_lab.report", "--store", store, "--out", str(tmp_path / "report.html")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait(timeout=120)
    assert process.returncode not in (1, 2)
    assert (tmp_path / "report.html").is_file()
