"""A sweep with cotrain through the real command line: its points train together, and each is recorded as if alone."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import lab_in, records_in, started, store_of, until
from safetensors.torch import load_file
from test_side_by_side import FAST, SABOTEUR

from lora_lab.composition.arguments import in_order
from lora_lab.composition.validation import faults
from lora_lab.config import EngineConfig, InvalidInput, TrainConfig, TrialConfig
from lora_lab.method_config import MethodConfig, OptimizerConfig, PrecisionConfig
from lora_lab.options import DType, EngineKind, Isolation, MethodKind, Plan
from lora_lab.store.fingerprint import point_digest
from lora_lab.sweep.cotraining import by_job, jobs_of
from lora_lab.sweep.plan import GridPoint, plan_trials
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.members import share_energy

BREAKS = "1e30"
"""A learning rate with which the loss is no number after a step."""

POINTS = ("-m", *FAST, "data.rows=16", "device=cpu", "method.rank=2,4", f"learning_rate=1e-2,{BREAKS}")
TOGETHER = "cotrain=rank,learning_rate"
OF_ITS_OWN = ("loss/train", "loss/eval", "loss/eval_before", "flops/per_token", "window/steps", "tokens/real_share")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same points together, and one after the other."""
    folders = []
    for name, more in (("together", [TOGETHER]), ("alone", [])):
        folder = tmp_path_factory.mktemp(name)
        said = lab_in(folder)(*POINTS, *more)
        assert said.code == 0, said.text
        folders.append(folder)
    return folders[0], folders[1]


def by_point(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["params"]["method.rank"], r["params"]["learning_rate"]): r for r in records_in(folder)}


def test_each_point_is_recorded_as_it_is_alone_and_one_that_diverges_stops_no_other(both: tuple[Path, Path]) -> None:
    found, wanted = map(by_point, both)
    assert len(found) == 4
    assert Counter(record["outcome"] for record in found.values()) == {"finished": 2, "diverged": 2}
    for point, record in found.items():
        one, other = (
            [(p["step"], p["value"]) for p in each["series"] if p["key"] == "step/loss"]
            for each in (record, wanted[point])
        )
        assert len(one) > 1
        assert repr(one) == repr(other), "to the last bit; nan is written as such"
        assert record["outcome"] == wanted[point]["outcome"]
        assert record["tags"].get("reason") == wanted[point]["tags"].get("reason")
        assert {key: record["metrics"].get(key) for key in OF_ITS_OWN} == {
            key: wanted[point]["metrics"].get(key) for key in OF_ITS_OWN
        }


def test_each_leaves_an_ordinary_adapter(both: tuple[Path, Path]) -> None:
    saved = []
    for folder in both:
        finished = (path.parent for path in folder.glob("multirun/[!.]*/*/*/adapter"))
        by_rank = {}
        for trial in finished:
            config = json.loads((trial / "adapter" / "adapter_config.json").read_text())
            by_rank[config["r"]] = load_file(trial / "adapter" / "adapter_model.safetensors")
        saved.append(by_rank)
    together, alone = saved
    assert together.keys() == alone.keys() == {2, 4}
    for rank, weights in together.items():
        assert weights.keys() == alone[rank].keys()
        assert all(weights[name].equal(alone[rank][name]) for name in weights)


def test_the_store_has_a_run_for_each_which_says_what_is_the_jobs(both: tuple[Path, Path]) -> None:
    runs = [run for run in store_of(both[0])[1] if "mlflow.parentRunId" in run.data.tags]
    assert Counter(run.info.status for run in runs) == {"FINISHED": 2, "FAILED": 2}
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs}) == 1
    assert {run.data.params["cotrain"] for run in runs} == {"4 by rank, learning_rate"}
    for run in runs:
        assert (run.data.tags["cotrain.members"], run.data.tags["cotrain.job"]) == ("4", "0000")
        assert "whole job" in run.data.tags["cotrain.shares"]
        assert "cotrain" not in run.data.tags["command"], "the command runs this trial alone"
    spans = {run.data.metrics["window/seconds"] for run in runs if run.info.status == "FINISHED"}
    assert len(spans) == 1, "they had one window"


def test_resume_runs_nothing_again(both: tuple[Path, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in both[0].rglob("record.json")}
    again = lab_in(both[0])(*POINTS, "cotrain=[rank,learning_rate]", "resume=true")
    assert "nothing left to run" in again.out, again.text
    assert {path: path.stat().st_mtime_ns for path in both[0].rglob("record.json")} == before


def test_a_report_compares_no_speed_of_trials_that_shared_it(both: tuple[Path, Path]) -> None:
    said = lab_in(both[0], module="lora_lab.report")("--full")
    assert said.code == 0, said.text
    assert "those of the whole job" in said.out
    assert "fastest" not in said.out


PAIR = ("-m", *FAST, "data.rows=16", "device=cpu", "learning_rate=1e-2,2e-2", "cotrain=learning_rate", "tracking=none")


def harmed(folder: Path, act: str) -> dict[str, str]:
    """What harms the worker of PAIR in its window."""
    plan = folder / "sabotage.json"
    plan.write_text(json.dumps({rate: [act, "in window"] for rate in ("0.01", "0.02")}))
    path = os.pathsep.join([str(SABOTEUR), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "SABOTAGE": str(plan)}


@pytest.mark.nightly
def test_a_worker_that_is_killed_ends_all_of_its_trials_and_resume_runs_them_again(tmp_path: Path) -> None:
    killed = lab_in(tmp_path)(*PAIR, **harmed(tmp_path, "kill"))
    assert killed.code == 1, killed.text
    records = records_in(tmp_path)
    assert [record["outcome"] for record in records] == ["killed", "killed"]
    assert all(signal.SIGKILL.name in record["tags"]["reason"] for record in records)
    said = lab_in(tmp_path)(*PAIR, "resume=true")
    assert said.code == 0, said.text
    assert Counter(record["outcome"] for record in records_in(tmp_path)) == {"killed": 2, "finished": 2}


def window_opened(folder: Path) -> bool:
    return any('"window"' in path.read_text() for path in folder.glob("multirun/[!.]*/*/0001/events.jsonl"))


@pytest.mark.nightly
@pytest.mark.parametrize("is_killed", [False, True], ids=["Ctrl-C", "the sweep is killed"])
def test_all_of_its_trials_are_recorded_as_killed_when_the_sweep_ends(tmp_path: Path, is_killed: bool) -> None:
    with started(tmp_path, *PAIR, **harmed(tmp_path, "hang")) as sweep:
        until(lambda: window_opened(tmp_path), "the window was opened")
        os.kill(sweep.pid, signal.SIGKILL if is_killed else signal.SIGINT)
        assert sweep.wait(60) == (-signal.SIGKILL if is_killed else 130)
    assert len(records_in(tmp_path)) == (0 if is_killed else 2)
    said = lab_in(tmp_path)(*PAIR, "resume=true")
    assert said.code == 0, said.text
    assert Counter(record["outcome"] for record in records_in(tmp_path)) == {"killed": 2, "finished": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*FAST, "cotrain=rank"), ["cotrain", "-m", "method.rank=8,16"]),
        (("-m", *FAST, "batch_size=1,2", "cotrain=rank"), ["cotrain=rank", "method.rank=8,16"]),
    ],
)
def test_what_cannot_train_together_is_refused_before_anything_starts(
    tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    said = lab_in(tmp_path)(*arguments)
    assert said.code == 2, said.text
    assert [word for word in words if word not in said.err] == [], said.err
    assert not list(tmp_path.rglob("trial.json"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"method": MethodConfig(kind=MethodKind.full)}, "method=full"),
        ({"method": MethodConfig(dropout=0.1)}, "method.dropout=0"),
        ({"method": MethodConfig(use_dora=True)}, "method.use_dora=false"),
        ({"engine": EngineConfig(kind=EngineKind.liger)}, "engine=liger"),
        ({"engine": EngineConfig(mlp_tile=64)}, "engine.mlp_tile=64"),
        ({"precision": PrecisionConfig(dtype=DType.fp16)}, "precision=bf16"),
        ({"optimizer": OptimizerConfig(target="torch.optim.SGD")}, "optimizer=adamw_fused"),
        ({"train": TrainConfig(epochs=1)}, "train.epochs"),
        ({"isolation": Isolation.inline}, "isolation=process"),
        ({"plan": Plan.fits}, "plan=fits"),
        ({"repeats": "auto", "contrast": "learning_rate"}, "repeats"),
    ],
)
def test_settings_that_exclude_one_another_are_faults(changes: dict[str, Any], word: str) -> None:
    config = replace(TrialConfig(optimizer=OptimizerConfig(optim="adamw_torch")), **changes)
    with_it = set(faults(replace(config, cotrain=["rank"]))) - set(faults(config))
    assert [fault for fault in with_it if fault.startswith("cotrain=rank: ") and word in fault] == [*with_it]
    assert with_it


def points(cotrain: list[str], **values: list[Any]) -> list[GridPoint]:
    [(name, several)] = values.items()
    made = [replace(TrialConfig(), cotrain=cotrain, **{name: value}) for value in several]
    return [
        GridPoint(overrides=[f"{name}={value}"], config=config, digest=point_digest(config), conditions={})
        for value, config in zip(several, made, strict=True)
    ]


def test_a_name_that_is_no_setting_of_members_is_refused_with_those_that_are() -> None:
    for names in (["rank", "colour"], ["rank", "rank"]):
        [fault] = set(faults(replace(TrialConfig(), cotrain=names))) - set(faults(TrialConfig()))
        assert ",".join(names) in fault
        assert "rank, alpha, learning_rate" in fault


def test_its_names_are_typed_as_one_value() -> None:
    assert in_order(["-m", "cotrain=rank,learning_rate"])[-1] == "cotrain=[rank,learning_rate]"
    assert in_order(["-m", "cotrain=[rank,alpha]"])[-1] == "cotrain=[rank,alpha]"


def test_points_that_differ_in_more_are_other_jobs_and_so_is_each_repeat() -> None:
    two = points(["learning_rate"], learning_rate=[1e-4, 2e-4])
    other = [replace(each, config=replace(each.config, batch_size=7)) for each in two]
    other = [replace(each, digest=point_digest(each.config)) for each in other]
    jobs = jobs_of([*two, *other])
    assert Counter(Counter(jobs.values()).values()) == {2: 2}
    planned = by_job(plan_trials([*two, *other], 2, 0), jobs)
    assert [number for _, number in planned] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({(trial.repeat, jobs[trial.point], number) for trial, number in planned}) == 4
    assert jobs_of(points([], learning_rate=[1e-4, 2e-4])) == {}


def test_one_value_of_cotrain_holds_for_a_sweep_which_has_to_name_what_differs() -> None:
    with pytest.raises(InvalidInput, match="one value for all points"):
        jobs_of([*points(["rank"], seed=[1]), *points(["alpha"], seed=[2])])
    with pytest.raises(InvalidInput, match="none would train together"):
        jobs_of(points(["rank"], seed=[1, 2]))


def test_energy_is_divided_and_power_is_the_cards() -> None:
    summary = Summary(metrics={"energy/joules": 90.0, "energy/joules_error": 9.0, "energy/mean_power_watts": 300.0})
    summary.metrics |= {"energy/net_joules_per_token": 3.0, "window/seconds": 5.0}
    share_energy(summary, 3)
    assert summary.metrics == {
        "energy/joules": 30.0,
        "energy/joules_error": 3.0,
        "energy/mean_power_watts": 300.0,
        "energy/net_joules_per_token": 1.0,
        "window/seconds": 5.0,
    }
