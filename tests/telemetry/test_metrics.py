"""Every metric that a trial records is described."""

import json
import re
from pathlib import Path

import pytest

import lora_lab
from lora_lab.telemetry.metrics import METRICS, metric

RECORD = Path(__file__).parents[2] / "benchmarks/results/h100/trial/record.json"
SERIES = {"step/loss", "step/seconds", "step/tokens_per_second"}


def test_a_trials_metrics_are_described() -> None:
    assert set(json.loads(RECORD.read_text())["metrics"]) - METRICS.keys() == set()


def test_metrics_named_in_the_code_that_makes_them_are_described() -> None:
    folder = Path(lora_lab.__file__).parent / "telemetry"
    named = {key for path in folder.glob("*.py") for key in re.findall(r'"([a-z_0-9]+/[a-z_0-9]+)"', path.read_text())}
    assert len(named) > 50
    assert {key for key in named if not key.startswith("step/") and not key.endswith("/s")} - METRICS.keys() == set()


@pytest.mark.parametrize("described", METRICS.values(), ids=lambda each: each.key)
def test_a_value_can_be_written(described) -> None:
    assert described.write(0.5)
    assert described.column


def test_another_versions_metric_has_a_name_all_the_same() -> None:
    assert metric("speed/of_light").column == "speed/of_light"
