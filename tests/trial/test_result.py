"""What a person reads when a trial is over."""

import re

import pytest

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


def shown(capsys: pytest.CaptureFixture[str], summary: Summary, end: End = FINISHED) -> dict[str, str]:
    """Each row's text by its label; a row without one continues the one above."""
    show_result(end, summary, [], [])
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
