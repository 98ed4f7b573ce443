"""What the benchmarks run is valid before somebody rents a card for it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from omegaconf import open_dict
from safetensors.numpy import save_file

from benchmarks import answers, cotrain, method_claims, numbers, stopping
from benchmarks.cards import cards
from benchmarks.paged import paged_by_rule
from lora_lab.composition.compose import CONF, load, register_schema
from lora_lab.report.measures import THROUGHPUT
from lora_lab.store.packed_runs import SHIPPED, PackedRuns
from lora_lab.store.stored_runs import StoredRuns

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SWEEPS = sorted(path.stem for path in (BENCHMARKS / "sweep").glob("*.yaml") if "MULTIRUN" in path.read_text())


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_point_of_a_sweep_composes(sweep: str, request: pytest.FixtureRequest) -> None:
    """By day the first and the last, which the same lines of a preset make as the others."""
    register_schema()
    base = [f"hydra.searchpath=[file://{BENCHMARKS}]", f"sweep={sweep}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        sweeper = compose("config", overrides=base, return_hydra_config=True).hydra.sweeper
        first = {key: str(values).partition(",")[0] for key, values in sweeper.params.items()}
        lines = sweeper.points or [""]
        for line in lines if request.config.getoption("--nightly") else {lines[0], lines[-1]}:
            point = first | dict(word.split("=", 1) for word in line.split())
            asked = [f"{key}={value}" for key, value in point.items() if not value.startswith("glob")]
            composed = compose("config", overrides=[*base, *asked])
            with open_dict(composed):
                composed.pop("hydra", None)
            load(composed)


@pytest.mark.parametrize("cell", cotrain.CELLS)
def test_adapters_can_train_together_as_the_benchmark_asks(cell: str) -> None:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for way in cotrain.WAYS.values():
            config = load(compose("config", overrides=[*cotrain.CELLS[cell], *way]))
            assert config.rows_per_step * config.seq_len == int(cell.partition("x")[0]) * int(cell.partition("x")[2])


def test_adapters_together_are_compared_with_all_that_ran_in_turn() -> None:
    together = {"tokens/s": 80.0, "seconds": 10.0, "GiB": 6.0, "J/token": 1.0}
    in_turn = {"tokens/s": 20.0, "seconds": 50.0, "GiB": 4.0, "J/token": None}
    found = cotrain.ratios(together, in_turn)
    assert found == {"faster": 4.0, "shorter": 5.0, "memory": 1.5, "energy": None}


def test_the_rule_pages_two_states_of_each_large_parameter(tmp_path: Path) -> None:
    sizes = {"large": (1000, 100), "small": (99_999,)}
    save_file(
        {name: np.zeros(size, np.float16) for name, size in sizes.items()}, tmp_path / "adapter_model.safetensors"
    )
    by_optimizer = {name: paged_by_rule(tmp_path, name) * 2**30 for name in ("adamw_fused", "paged_adamw")}
    assert by_optimizer == {"adamw_fused": 0, "paged_adamw": 200_000}
    assert paged_by_rule(tmp_path, "paged_adamw_32bit") * 2**30 == 800_000


def test_a_claim_of_memory_is_judged_by_the_whole_model_and_only_where_the_rule_holds() -> None:
    """GaLore keeps a third of AdamW's state in 7B shapes; in few layers the tables weigh more."""

    def trial(state: int, whole: int, rule: float = 1.0) -> dict[str, object]:
        rules = {"by_rule": {"state": state * rule}, "whole_by_rule": {"state": whole}}
        return {"state": state, "peak": None, "outcome": "finished", **rules}

    trials = {"adamw": trial(100, 1000), "galore": trial(50, 345)}
    said = method_claims.claims_of(trials, is_dry=False)
    assert said["galore_state"]["whole"] == pytest.approx(0.655)
    assert said["galore_state"]["verdict"].startswith("supported")
    assert said["galore_8bit_total"]["verdict"].startswith("not testable"), "its trial is missing"
    said = method_claims.claims_of(trials | {"galore": trial(50, 500)}, is_dry=False)
    assert said["galore_state"]["verdict"].startswith("not reached")
    said = method_claims.claims_of(trials | {"galore": trial(50, 345, rule=0.9)}, is_dry=False)
    assert said["galore_state"]["verdict"].startswith("not testable"), "what was measured is off the rule"
    assert "dry run" in method_claims.claims_of(trials, is_dry=True)["galore_state"]["verdict"]


def test_the_stored_error_rates_of_the_stopping_rule_are_as_stated() -> None:
    stored = json.loads((BENCHMARKS / "results/cpu/stopping.json").read_text())
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


@pytest.mark.parametrize("page", list(numbers.pages()), ids=lambda page: page.name)
def test_numbers_on_a_page_are_those_of_the_stored_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert numbers.remade(text) == text, "python -m benchmarks.numbers makes it again"


def test_every_block_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in numbers.pages())
    assert [name for name in numbers.MADE if f"<!-- begin {name} -->" not in text] == []


@pytest.mark.parametrize("page", list(numbers.pages()), ids=lambda page: page.name)
def test_no_speed_memory_or_error_is_typed_by_hand(page: Path) -> None:
    """Thresholds and invented examples are not meant: they have no such unit, or no decimals."""
    measured = r"\d\s(?:tokens/s|J/token|TFLOP/s)|\d\.\d+\s(?:GiB|ms)\b|\d ± \d"
    found = re.search(measured, numbers.outside(page.read_text(encoding="utf-8")))
    assert found is None, f"{found[0]}: let a function of benchmarks/numbers.py make it from a stored record"


def test_a_stale_number_is_replaced_and_a_lone_mark_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "MADE", {"speed": lambda: "12 tokens/s"})
    page = "before\n<!-- begin speed -->\n11 tokens/s\n<!-- end speed -->\nafter\n"
    made = numbers.remade(page)
    assert "11" not in made
    assert made.startswith("before\n")
    assert made.endswith("after\n")
    assert numbers.remade(made) == made
    for broken in (page.replace("end speed", "end sped"), page.replace("speed", "heat")):
        with pytest.raises(ValueError, match=r"partner|heat"):
            numbers.remade(broken)


def test_no_text_of_the_picture_is_cut_off() -> None:
    figure = answers.drawing(*answers.factorial())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert len(texts) > 10
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= 0, text.get_text()
        assert box.x1 <= figure.bbox.width, text.get_text()


def test_what_the_table_by_card_names_fits_and_leaves_the_reserve_free() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in cards().splitlines() if " GB |" in line]
    assert {row[0] for row in rows} == {"6 GB", "8 GB", "12 GB", "16 GB", "24 GB"}
    for row in rows:
        card, needs = float(row[0].removesuffix(" GB")), float(row[6])
        assert 0.3 * card < needs <= 0.95 * card + 0.05  # rounded to a tenth; far below, something larger was not tried
    trials, _ = StoredRuns(PackedRuns(SHIPPED)).runs()
    doubted = {f"{THROUGHPUT.of(t):,.0f}" for t in trials if t.tags["validity"] != "valid" and THROUGHPUT.of(t)}
    assert doubted
    for row in rows:
        assert row[7].endswith(" *") is (row[7].removesuffix(" *") in doubted)
