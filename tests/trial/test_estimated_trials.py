"""A trial's record has what was estimated of its memory; a single trial that cannot fit its card does not start."""

import json
from pathlib import Path

import pytest
from conftest import Lab, record_of, some_by_day, with_fakes

from lora_lab.composition.once import compose_once
from lora_lab.config import ModelConfig, TrialConfig
from lora_lab.options import ModelSource
from lora_lab.recompute import main as recompute
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.summary import summarise
from lora_lab.trial import estimated
from lora_lab.trial.estimated import note_estimate

QWEN = (
    *("model=qwen2_5_1_5b", "model.weights=random", "data=random_tokens", "data.rows=8"),
    *("batch_size=4", "seq_len=1024"),
    *("measure=quick", "measure.idle_seconds=0", "tracking=none"),
)
"""Too large for the fake card, which has 8 GiB."""


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a command that sees a fake card. Its worker fails: torch sees no card."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return {"PYTHONPATH": with_fakes()}


@pytest.mark.parametrize(
    ("more", "gib"),
    some_by_day([((), "8.00"), (("vram_limit_gib=7",), "7.00")], by_day=[((), "8.00")]),
    ids=["card", "emulated"],
)
def test_a_single_trial_that_cannot_fit_is_refused_with_what_to_type(
    lab: Lab, tmp_path: Path, faked: dict[str, str], more: tuple[str, ...], gib: str
) -> None:
    said = lab(*QWEN, *more, **faked)
    assert said.code == 2, said.text
    assert f"{gib} GiB" in said.err
    [advice] = [line for line in said.err.splitlines() if "batch_size=1" in line]
    assert "plan=all" in said.err
    assert not list(tmp_path.rglob("trial.json"))
    assert not list(tmp_path.rglob("worker.log"))
    changes = [word for word in advice.split() if "=" in word]
    assert lab(*QWEN, *more, *changes, **faked).code == 1, "it starts, and its worker finds no card"


@pytest.mark.nightly
def test_with_plan_all_it_runs_and_its_record_keeps_the_estimate(
    lab: Lab, tmp_path: Path, faked: dict[str, str]
) -> None:
    assert lab(*QWEN, "plan=all", **faked).code == 1
    record = record_of(tmp_path)
    metrics, tags = record["metrics"], record["tags"]
    sizes = [metrics[f"estimate/{name}_gib"] for name in ("allocated", "reserved", "card", "high")]
    assert sizes == sorted(sizes)
    assert 8 < metrics["estimate/low_gib"] < metrics["estimate/high_gib"]
    assert tags["estimate_verdict"] == "too large"
    assert tags["absent.estimate/card_error"]
    assert "estimate/card_error" not in metrics
    [folder] = tmp_path.glob("multirun/2*/*")
    assert recompute([str(folder)]) == 0


def test_a_doubtful_one_is_run_with_a_warning(lab: Lab, tmp_path: Path, faked: dict[str, str]) -> None:
    assert lab(*QWEN, "batch_size=2", "seq_len=512", "vram_limit_gib=7", **faked).code == 1
    record = record_of(tmp_path)
    assert record["tags"]["estimate_verdict"] == "doubtful"
    low, high = (f"{record['metrics'][f'estimate/{end}_gib']:.2f}" for end in ("low", "enough"))
    assert f"{low} to {high} GiB" in record["tags"]["warnings"]


@pytest.mark.parametrize(("held", "is_certain"), some_by_day([(1.0, False), (0.0, True)], by_day=[(1.0, False)]))
def test_what_other_programs_hold_of_the_card_makes_it_doubtful(
    lab: Lab, tmp_path: Path, faked: dict[str, str], held: float, is_certain: bool
) -> None:
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"used": round(held * 2**30)}))
    assert lab(*QWEN, "batch_size=2", "seq_len=512", **faked, FAKE_NVML_STATE=str(state)).code == 1
    record = record_of(tmp_path)
    assert record["tags"]["estimate_verdict"] == "fits", "the card alone is enough"
    assert 7 < record["metrics"]["estimate/enough_gib"] < 8
    assert ("1.00 are in use" not in record["tags"].get("warnings", "")) is is_certain


@pytest.mark.nightly
def test_a_sweep_runs_what_a_single_trial_would_not(lab: Lab, tmp_path: Path, faked: dict[str, str]) -> None:
    assert lab("-m", *QWEN, "seed=0", **faked).code == 1
    [summary] = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["tags"]["estimate_verdict"] == "too large"


def test_adapters_that_do_not_fit_together_are_run_with_a_warning_and_each_record_has_it(
    lab: Lab, tmp_path: Path, faked: dict[str, str]
) -> None:
    pair = ("method=lora", "batch_size=2", "seq_len=512", "method.rank=8,256", "cotrain=rank")
    assert lab("-m", *QWEN, *pair, **faked).code == 1
    summaries = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    assert len(summaries) == 2
    one, other = ({key: value for key, value in each["metrics"].items() if "estimate/" in key} for each in summaries)
    assert one == other
    assert one["estimate/low_gib"] > 8
    least = f"2 adapters do not fit together: with rows of seq_len=512 they need at least {one['estimate/low_gib']:.2f}"
    for path in tmp_path.rglob("record.json"):
        tags = json.loads(path.read_text())["tags"]
        assert tags["estimate_verdict"] == "too large"
        assert least in tags["warnings"]


def test_a_trial_on_the_cpu_has_no_estimate(lab: Lab, tmp_path: Path) -> None:
    assert lab("model=tiny", "measure=quick", "seq_len=64", "tracking=none", "plan=fits").code == 0
    record = record_of(tmp_path)
    assert record["tags"]["absent.estimate/card_gib"] == "no NVIDIA card was used"
    assert not [name for name in record["metrics"] if name.startswith("estimate/")]


@pytest.mark.parametrize(
    ("more", "needed"),
    [((), "compute capability 8.0"), (("precision=fp16", "capacity=24gib"), "vram_limit_gib=24")],
    ids=["format", "capacity"],
)
def test_what_the_card_cannot_run_at_any_size_is_not_called_too_large(
    lab: Lab, tmp_path: Path, faked: dict[str, str], more: tuple[str, ...], needed: str
) -> None:
    said = lab(*QWEN, *more, **faked, FAKE_NVML_CAPABILITY="7.5")
    assert said.code == 3, said.text
    record = record_of(tmp_path)
    assert record["outcome"] == "unsupported"
    assert needed in record["tags"]["reason"]
    assert record["tags"]["estimate_verdict"] == "too large"


def test_a_failure_of_the_estimate_costs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(config: TrialConfig) -> None:
        raise ZeroDivisionError("a layer without heads")

    monkeypatch.setattr(estimated, "beforehand", fails)
    seen = HostFacts(card_bytes=2**33)
    note_estimate(seen, TrialConfig())
    assert seen.estimate is None
    assert "a layer without heads" in seen.no_estimate


def test_a_model_that_is_not_here_yet_is_estimated_once_it_is(tmp_path: Path) -> None:
    config = TrialConfig(model=ModelConfig(source=ModelSource.local, path=str(tmp_path)))
    seen = HostFacts(card_bytes=2**33)
    note_estimate(seen, config)
    assert seen.estimate is None
    assert seen.no_estimate
    shapes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    written = {"model_type": "llama", "num_attention_heads": 4, **shapes}
    (tmp_path / "config.json").write_text(json.dumps(written))
    note_estimate(seen, config)
    assert seen.estimate is not None
    assert seen.estimate.verdict == "fits"
    assert seen.no_estimate == ""


def test_a_trial_that_a_card_ran_is_compared_with_its_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")  # as it was measured
    folder = TrialFolder(Path(__file__).parents[2] / "benchmarks/results/h100/trial")
    events, samples, seen, _ = folder.read_inputs()
    asked = folder.manifest()
    assert asked is not None
    shape = [f"{name}={asked.record.params[name]}" for name in ("batch_size", "seq_len", "method.rank")]
    same = compose_once([*QWEN, "optimizer=paged_adamw", *shape])
    note_estimate(seen, same)
    summary = summarise(events, samples, seen, asked.t)
    off = [summary.metrics[f"estimate/{name}_error"] for name in ("allocated", "reserved", "card")]
    assert all(abs(error) < 0.1 for error in off), off
    low, high = (summary.metrics[f"estimate/{end}_gib"] for end in ("low", "high"))
    assert low < summary.metrics["vram/peak_process_gib"] < high
    assert summary.tags["estimate_verdict"] == "fits"
