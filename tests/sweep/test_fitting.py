"""plan=fits: a sweep on a card of 8 GiB that is none leaves out what certainly needs more, and says so. That card
does not calculate in bf16, so what is tried ends as unsupported."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import Said, lab_in, records_in, with_fakes
from planted_rates import plant_rates

from lora_lab.config import TrialConfig
from lora_lab.options import Plan
from lora_lab.placement import Placement
from lora_lab.store.sweep_folder import Planned, SweepFolder, TooLarge
from lora_lab.sweep import fitting, forecasting
from lora_lab.sweep.fitting import Judged, judged
from lora_lab.sweep.forecasting import forecast_line
from lora_lab.sweep.plan import GridPoint
from lora_lab.telemetry.nvml import Card

SMALL = ("measure=quick", "measure.idle_seconds=0", "data=random_tokens", "data.rows=16", "seq_len=32")
POINTS = ("-m", *SMALL, "model=tiny", "vram_limit_gib=0.3,0.9,2", "repeats=2")
SCARCE, NARROW, ENOUGH = "0.3", "0.9", "2.0"
CARD = Card(index=0, uuid="GPU-0", name="a card", total_bytes=2**33, compute_capability=(8, 6), driver="1")
AS_PLANNED = {(ENOUGH, "unsupported"): 2, (NARROW, "unsupported"): 2, (SCARCE, "predicted_out_of_memory"): 1}


def run(folder: Path, *arguments: str) -> Said:
    card = {"PYTHONPATH": with_fakes(), "CUDA_VISIBLE_DEVICES": "0", "FAKE_NVML_CAPABILITY": "7.5"}
    return lab_in(folder)(*arguments, XDG_CACHE_HOME=str(folder / "cache"), **card)


def ends(records: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    return Counter((record["params"]["vram_limit_gib"], record["outcome"]) for record in records)


@dataclass(frozen=True)
class Story:
    """A sweep with plan=fits, the same resumed, and resumed with everything."""

    folder: Path
    first: Said
    after_first: list[dict[str, Any]]
    again: Said
    after_again: list[dict[str, Any]]
    everything: Said


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("only what fits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        plant_rates(1e14, 1e12)
    first = run(folder, *POINTS, "plan=fits")
    after_first = records_in(folder)
    again = run(folder, *POINTS, "plan=fits", "resume=true")
    after_again = records_in(folder)
    everything = run(folder, *POINTS, "plan=all", "resume=true")
    return Story(folder, first, after_first, again, after_again, everything)


def test_what_certainly_does_not_fit_is_recorded_once_and_nothing_of_it_is_begun(story: Story) -> None:
    assert ends(story.after_first) == AS_PLANNED, story.first.text
    [skipped] = [record for record in story.after_first if record["params"]["vram_limit_gib"] == SCARCE]
    low, high = (skipped["metrics"][f"estimate/{name}_gib"] for name in ("low", "high"))
    assert 0.3 < low < high < 2
    assert f"{low:.2f} GiB" in skipped["tags"]["reason"]
    assert not [name for name in skipped["metrics"] if name.startswith(("vram/", "throughput/", "time/"))]
    records = story.folder.glob("multirun/*/*/*/record.json")
    [place] = [path.parent for path in records if skipped["id"] in path.read_text()]
    assert not (place / "worker.log").exists(), "no worker was started"
    assert json.loads((place / "delivered.json").read_text())["run_id"], "the store has it"


def test_the_start_says_what_is_tried_and_what_is_not(story: Story) -> None:
    assert "1 fit, 1 doubtful and tried, 1 skipped" in story.first.out
    assert "doubtful: vram_limit_gib=0.9" in story.first.out
    assert "skipped: vram_limit_gib=0.3:" in story.first.out


def test_the_start_says_time_and_energy_of_what_is_tried_alone(story: Story) -> None:
    [line] = [line for line in story.first.out.splitlines() if line.startswith("time:")]
    assert "2 points from the card's rates" in line
    assert "kWh" in line, "the fake card says how much it may draw"
    assert "unknown" not in line


def test_a_resume_with_the_same_plan_skips_without_another_record(story: Story) -> None:
    assert ends(story.after_again) == AS_PLANNED, story.again.text
    assert "4 trials: 2 points x 2 repeats, 4 of them done already" in story.again.out, "the skipped one is no trial"


def test_a_resume_with_everything_runs_what_was_skipped_as_often_as_asked(story: Story) -> None:
    counts = ends(records_in(story.folder))
    assert counts[SCARCE, "unsupported"] == 2, story.everything.text
    assert counts[SCARCE, "predicted_out_of_memory"] == 1


def test_every_point_skipped_is_the_exit_code_of_nothing_finished(tmp_path: Path) -> None:
    large = ("model=llama3_1_8b", "model.weights=random", "method=lora")
    said = run(tmp_path, "-m", *SMALL, *large, "plan=fits", "tracking=none")
    assert said.code == 3, said.text
    assert not [line for line in said.out.splitlines() if line.startswith("time:")], "nothing takes any"
    [record] = records_in(tmp_path)
    assert record["outcome"] == "predicted_out_of_memory"
    assert record["metrics"]["estimate/low_gib"] > 14, "the weights alone are 8 billion times two bytes"


@pytest.mark.nightly
def test_what_was_measured_before_is_not_left_out_by_an_estimate(tmp_path: Path) -> None:
    points = ("-m", *SMALL, "model=tiny", "vram_limit_gib=0.3,2", "tracking=none")
    run(tmp_path, *points)
    said = run(tmp_path, *points, "repeats=2", "plan=fits", "resume=true")
    assert ends(records_in(tmp_path)) == {(SCARCE, "unsupported"): 2, (ENOUGH, "unsupported"): 2}, said.text
    [skipped] = [line for line in said.out.splitlines() if line.startswith("plan=fits:")]
    assert "0 skipped" in skipped


@pytest.mark.parametrize("failing", ["beforehand", "verdict_of"])
def test_a_failure_of_the_estimate_or_the_forecast_stops_no_sweep(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(fitting, "beforehand", lambda _: Mock(estimate=Mock()))
    monkeypatch.setattr(fitting, failing, fail)
    monkeypatch.setattr(forecasting, "total", fail)
    monkeypatch.setattr(fitting, "choose_placement", lambda _: Placement(cards=(CARD,)))
    point = GridPoint(overrides=[], config=TrialConfig(plan=Plan.fits), digest="a", conditions={})
    found = judged([point])
    assert "by nothing" in found.unknown["a"]
    assert not found.too_large
    assert "by nothing" in forecast_line([point], [], {})


def test_a_job_that_goes_on_from_a_checkpoint_counts_as_measured(story: Story, tmp_path: Path) -> None:
    [sweep] = {path.parent for path in story.folder.glob("multirun/*/*/sweep.json")}
    shutil.copytree(sweep, tmp_path / "sweep")
    folder = SweepFolder(tmp_path / "sweep")
    trial = folder.read().trials[0]
    (tmp_path / "sweep" / "0000" / "record.json").unlink()
    for later in (tmp_path / "sweep").glob("0000-*"):
        shutil.rmtree(later)
    assert not folder.has_measured(trial)
    (tmp_path / "sweep" / "0000" / "checkpoints" / "000002").mkdir(parents=True)
    (tmp_path / "sweep" / "0000" / "checkpoints" / "000002" / "complete.json").write_text("{}")
    assert folder.has_measured(trial)


def test_without_a_card_nothing_is_known_and_everything_runs(tmp_path: Path) -> None:
    said = lab_in(tmp_path)(
        *("-m", *SMALL, "model=tiny", "method=lora", "precision=fp32", "device=cpu", "plan=fits", "tracking=none"),
        OMP_NUM_THREADS="1",
    )
    assert said.code == 0, said.text
    assert "1 run without an estimate" in said.out
    assert [record["outcome"] for record in records_in(tmp_path)] == ["finished"]


def test_a_comparison_cannot_leave_out_one_of_its_sides(tmp_path: Path) -> None:
    auto = ("repeats=auto", "contrast=batch_size", "tracking=none")
    said = run(tmp_path, "-m", *SMALL, "model=tiny", "vram_limit_gib=0.3", "batch_size=1,2", *auto, "plan=fits")
    assert said.code == 2, said.text
    assert "plan=all" in said.err
    assert not records_in(tmp_path)


def test_repeats_of_a_skipped_point_are_left_out_and_numbers_stay_unique() -> None:
    def planned(number: int, point: str, repeat: int) -> Planned:
        return Planned(
            number=number,
            settings={},
            asked_place=0,
            repeat=repeat,
            overrides=[],
            point=point,
            fingerprint=f"{point}{repeat}",
        )

    trials = [planned(2 * repeat + place, point, repeat) for repeat in range(3) for place, point in enumerate("ab")]
    memory = Judged(too_large={"a": TooLarge(low_gib=9.0, card_gib=8.0)})
    kept = memory.once(trials)
    assert [(trial.number, trial.fingerprint) for trial in kept] == [(0, "a0"), (1, "b0"), (2, "b1"), (3, "b2")]
    assert TrialConfig().plan is None
