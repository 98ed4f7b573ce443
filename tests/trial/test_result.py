"""What a person reads when a trial is over."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from lora_lab.base_weights import BaseWeights
from lora_lab.files import write_json
from lora_lab.outcome import End, Outcome
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.metrics import metric
from lora_lab.trial.result import show_result

FINISHED = End(outcome=Outcome.finished, reason="")
FIGURES = {
    "throughput/tokens_per_second": 12345.6,
    "throughput/tokens_per_second_error": 78.9,
    "throughput/seconds_per_10k_tokens": 0.81,
    "throughput/step_seconds_p50": 0.083,
    "throughput/gpu_busy_share": 0.625,
    "flops/mfu": 0.314,
    "vram/peak_allocated_gib": 3.25,
    "vram/peak_device_gib": 4.5,
    "energy/joules_per_token": 0.0321,
    "energy/joules_per_token_error": 0.0004,
    "energy/net_joules_per_token": 0.0271,
    "energy/net_joules_per_token_error": 0.0005,
    "loss/eval_before": 2.5,
    "loss/eval": 1.75,
}
UNMISSED = ("throughput/seconds_per_10k_tokens", "energy/net_joules_per_token")
TAGS = {"regime": "host-bound", "energy_source": "counter", "validity": "valid"}


def shown(
    capsys: pytest.CaptureFixture[str], summary: Summary, end: End = FINISHED, folder: Path = Path()
) -> dict[str, str]:
    """Each row's text by its label; a row without one continues the one above."""
    show_result(end, summary, [], [], folder)
    rows: dict[str, str] = {}
    label = ""
    for line in capsys.readouterr().out.splitlines():
        if found := re.fullmatch(r"│ (.*?) *│ (.*?) *│", line):
            label = found[1] or label
            rows[label] = f"{rows[label]} {found[2]}" if label in rows else found[2]
    return rows


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_figures_are_shown_with_their_errors_and_the_regime(capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(capsys, Summary(metrics=FIGURES, tags=TAGS))
    assert rows["throughput"] == "12,346 ± 79 tokens/s"
    assert "host-bound" in rows["GPU at work"]
    for key, value in FIGURES.items():
        described = metric(key)
        if not key.endswith("_error"):
            assert described.form.format(value) in rows[described.title]


@pytest.mark.parametrize(("shapes", "row"), [(4.0, "21.8 s for 4 row lengths"), (1.0, "21.8 s for 1 row length")])
def test_what_was_compiled_is_a_row(capsys: pytest.CaptureFixture[str], shapes: float, row: str) -> None:
    compiled = {"engine/compile_seconds": 21.84, "engine/shapes": shapes}
    assert shown(capsys, Summary(metrics=FIGURES | compiled, tags=TAGS))["compilation"] == row


def test_nobody_is_told_that_nothing_was_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    summary = Summary(metrics=FIGURES, tags=TAGS, absent={"engine/compile_seconds": "nothing was compiled"})
    assert "compilation" not in shown(capsys, summary)


@pytest.mark.parametrize("source", ["instant_power", "average_power"])
def test_energy_that_is_not_the_counters_says_so(capsys: pytest.CaptureFixture[str], source: str) -> None:
    rows = shown(capsys, Summary(metrics=FIGURES, tags={**TAGS, "energy_source": source}))
    assert rows["energy"] == f"0.0321 ± 0.0004 J/token, by {source.replace('_', ' ')}"


def test_a_figure_without_an_error_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    known = {name: value for name, value in FIGURES.items() if not name.endswith("_error")}
    assert not any("±" in row for row in shown(capsys, Summary(metrics=known, tags=TAGS)).values())


@pytest.mark.parametrize("verdict", ["invalid", "doubtful", "valid", "unknown"])
def test_only_what_speaks_against_a_run_is_a_row_of_its_own(capsys: pytest.CaptureFixture[str], verdict: str) -> None:
    tags = {**TAGS, "validity": verdict, "validity_reasons": "heat held the clocks down [50 %]"}
    rows = shown(capsys, Summary(metrics=FIGURES, tags=tags))
    spoken = {label: row for label, row in rows.items() if "heat" in row}
    assert spoken == ({verdict: "heat held the clocks down [50 %]"} if verdict in ("invalid", "doubtful") else {})


def test_a_figure_that_is_absent_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    on_a_card = {name: value for name, value in FIGURES.items() if name.startswith("vram")}
    why = {
        "throughput/tokens_per_second": "the window [was] not completed",
        "throughput/seconds_per_10k_tokens": "the window [was] not completed",
        "throughput/gpu_busy_share": "no step was profiled",
        "flops/mfu": "no rate",
        "energy/joules_per_token": "the sensor failed",
        "energy/net_joules_per_token": "the sensor failed",
        "loss/eval": "no rows",
    }
    rows = shown(capsys, Summary(metrics=on_a_card, absent=why, tags={"energy_source": "none"}))
    assert {metric(key).title: f"absent: {reason}" for key, reason in why.items() if key not in UNMISSED} == {
        label: row for label, row in rows.items() if row.startswith("absent")
    }


def test_on_a_cpu_nobody_is_told_what_only_a_card_has(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"throughput/tokens_per_second": 10.0, "flops/mfu": 0.5}
    absent = {"throughput/gpu_busy_share": "no step was profiled", "vram/peak_device_gib": "no NVIDIA card was used"}
    rows = shown(capsys, Summary(metrics=metrics, absent=absent, tags={"energy_source": "none"}))
    assert rows == {"throughput": "10 tokens/s", "VRAM, card's peak": "absent: no NVIDIA card was used"}


def test_a_trial_that_did_not_finish_says_why_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    end = End(outcome=Outcome.out_of_memory, reason="no [room] left")
    rows = shown(capsys, Summary(warnings=["one", "two [of] them"]), end)
    assert rows == {"why": "no [room] left", "warning": "one two [of] them"}


JOB = {
    "job/hours": 7.25,
    "job/kwh": 1.5,
    "job/cost": 0.45,
    "job/best_heldout_loss": 1.7,
    "job/best_step": 1200.0,
}


def test_the_result_of_a_job_leads_with_what_it_brought_and_cost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = shown(capsys, Summary(metrics=FIGURES | JOB, tags=TAGS), folder=tmp_path)
    losses, hours, kwh, cost = list(rows.values())[:4]
    for figure in ("2.5000 before", "1.7500 after", "1.7000 after step 1,200"):
        assert figure in losses
    assert [metric(key).form.format(JOB[key]) for key in ("job/hours", "job/kwh", "job/cost")] == [
        figure.split()[0] for figure in (hours, kwh, cost)
    ]
    assert sum("1.7500" in row for row in rows.values()) == 1


def test_a_job_without_a_sensor_or_held_out_rows_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    absent = {"loss/eval": "measure.eval_rows=0", "loss/eval_before": "measure.eval_rows=0", "job/kwh": "no card"}
    rows = shown(capsys, Summary(metrics={"job/hours": 1.0}, absent=absent, tags=TAGS), folder=tmp_path)
    assert "absent: measure.eval_rows=0" in next(iter(rows.values()))
    assert "absent: no card" in rows.values()


def test_the_end_of_a_job_says_how_to_load_its_adapter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    summary = Summary(metrics={"job/hours": 1.0}, tags=TAGS)
    show_result(FINISHED, summary, [], [], tmp_path)
    assert "python" not in capsys.readouterr().out, "there is no adapter"
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    weights = BaseWeights(source="hub", id="org/model", commit="c0ffee", folder="/cache/c0ffee")
    write_json(tmp_path / "weights.json", asdict(weights))
    show_result(FINISHED, summary, [], [], tmp_path)
    out = capsys.readouterr().out
    assert weights.command(tmp_path) in out
    assert "org/model at commit c0ffee" in out
