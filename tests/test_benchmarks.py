"""What the benchmarks run is valid before somebody rents a card for it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from safetensors.numpy import save_file

from benchmarks import stopping
from benchmarks.paged import paged_by_rule
from lora_lab.composition.compose import CONF, load, register_schema

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SWEEPS = sorted(path.stem for path in (BENCHMARKS / "sweep").glob("*.yaml") if "MULTIRUN" in path.read_text())


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_point_of_a_sweep_composes(sweep: str) -> None:
    register_schema()
    base = [f"hydra.searchpath=[file://{BENCHMARKS}]", f"sweep={sweep}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        sweeper = compose("config", overrides=base, return_hydra_config=True).hydra.sweeper
        first = {key: str(values).partition(",")[0] for key, values in sweeper.params.items()}
        for line in sweeper.points or [""]:
            point = first | dict(word.split("=", 1) for word in line.split())
            asked = [f"{key}={value}" for key, value in point.items() if not value.startswith("glob")]
            composed = compose("config", overrides=[*base, *asked])
            with open_dict(composed):
                composed.pop("hydra", None)
            load(composed)


def test_the_rule_pages_two_states_of_each_large_parameter(tmp_path: Path) -> None:
    sizes = {"large": (1000, 100), "small": (99_999,)}
    save_file(
        {name: np.zeros(size, np.float16) for name, size in sizes.items()}, tmp_path / "adapter_model.safetensors"
    )
    by_optimizer = {name: paged_by_rule(tmp_path, name) * 2**30 for name in ("adamw_fused", "paged_adamw")}
    assert by_optimizer == {"adamw_fused": 0, "paged_adamw": 200_000}
    assert paged_by_rule(tmp_path, "paged_adamw_32bit") * 2**30 == 800_000


def test_the_docs_quote_the_stored_error_rates_of_the_stopping_rule_and_these_are_as_stated() -> None:
    stored = json.loads((BENCHMARKS / "results/cpu/stopping.json").read_text())
    docs = stopping.DOCS.read_text(encoding="utf-8")
    assert docs == stopping.in_docs(docs, stored["rows"], stored["families"])
    ours = [row["by_effect"] for row in stored["rows"] if row["rule"] == "repeats=auto"]
    assert len(ours) == len(stopping.SCENARIOS)
    assert all(each["0"]["changed"] <= stopping.LEVEL for each in ours)
    assert all(each["the margin"]["equivalent"] <= stopping.LEVEL for each in ours)


@pytest.mark.parametrize("noise", ["independent", "AR(1)", "drift"])
def test_simulated_pairs_have_the_noise_and_the_change_that_were_planted(noise: str) -> None:
    planted = stopping.Scenario("host-bound", 0.08, 5.0, noise)
    found = stopping.differences(planted, 0.05, 200)
    assert found.shape == (200, stopping.MOST_PAIRS)
    assert abs(found.mean() - 0.05) < 0.002
    scale = np.sqrt(1 - stopping.AR) if noise == "AR(1)" else 1.0
    assert 0.97 < found.std() / (0.08 * scale) < 1.03
