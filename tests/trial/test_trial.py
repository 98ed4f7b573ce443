"""One trial through the real command line into a real MLflow store."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Lab, Said, lab_in, record_of, records_in, save_tiny, store_of
from peft import PeftModel

from lora_lab.composition.keys import GROUPS
from lora_lab.config import ModelConfig
from lora_lab.options import ModelSource, Weights
from lora_lab.worker.models import load_architecture

TINY = ("model=tiny", "measure=quick", "seq_len=128", "data.rows=60")


LISTS_MODULES = """
import atexit, sys
if "lora_lab" in sys.orig_argv:  # not in the server of workers
    atexit.register(lambda: open("modules.txt", "w").write("\\n".join(sys.modules)))
"""


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    """A finished trial in a folder with spaces in its name; modules.txt says what the command has imported."""
    folder = tmp_path_factory.mktemp("my own folder")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(LISTS_MODULES)
    path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
    asked = (*TINY, "optimizer=paged_adamw", "precision=fp16", "seed=3")
    return folder, lab_in(folder, real=True)(*asked, PYTHONPATH=path)


def test_it_finishes_and_tells_the_user_what_came_out(trial: tuple[Path, Said]) -> None:
    folder, said = trial
    assert said.code == 0, said.text
    for words in ("finished", "tokens/s", "time per 10k tokens", "held-out loss before", "held-out loss"):
        assert words in said.out
    assert "energy" in said.out
    assert "absent: no NVIDIA card was used" in said.out
    assert "fp16 on a CPU has neither autocast nor GradScaler" in said.out
    assert "paged optimizer state on a CPU is plain memory" in said.out
    assert f"mlflow ui --backend-store-uri 'sqlite:///{folder}/mlruns/mlflow.db'" in said.out
    assert "measured window" in said.err


def test_mlflow_holds_params_metrics_series_tags(trial: tuple[Path, Said]) -> None:
    client, [run] = store_of(trial[0])
    assert run.info.status == "FINISHED"
    params, metrics, tags = run.data.params, run.data.metrics, run.data.tags
    assert {g: params[g] for g in ("optimizer", "precision", "method", "model")} == {
        "optimizer": "paged_adamw",
        "precision": "fp16",
        "method": "qlora",
        "model": "tiny",
    }
    assert set(GROUPS) <= set(params)
    assert (params["optimizer.optim"], params["batch_size"], params["method.rank"]) == ("paged_adamw_8bit", "2", "16")
    speed = metrics["throughput/tokens_per_second"]
    assert metrics["throughput/seconds_per_10k_tokens"] == pytest.approx(1e4 / speed)
    assert {"loss/eval", "loss/eval_before", "tokens/real_share", "window/seconds"} <= set(metrics)
    of_a_card = {name for name in metrics if name.startswith(("energy/", "vram/", "card/"))}
    of_a_cpu = {name for name in of_a_card if name.startswith(("energy/cpu", "vram/optimizer"))}
    assert of_a_card == of_a_cpu, "nothing was there to measure the rest"
    assert metrics["vram/optimizer_gib"] > 0
    assert tags["absent.energy/joules_per_token"] == "no NVIDIA card was used"
    assert (tags["outcome"], tags["device"].split()[0], tags["ran.optimizer_bits"]) == ("finished", "cpu", "8")
    assert tags["version.torch"].startswith("2.")
    assert tags["commit"]
    history = client.get_metric_history(run.info.run_id, "Steps/loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 4]


def test_the_artifacts_are_all_there(trial: tuple[Path, Said]) -> None:
    client, [run] = store_of(trial[0])
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names == {
        "adapter",
        "config.yaml",
        "environment.json",
        "events.jsonl",
        "samples.jsonl",
        "seen.json",
        "summary.json",
        "trial.json",
        "weights.json",
        "worker.log",
    }
    adapter = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, "adapter")}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= adapter


def test_the_adapter_loads_with_peft_and_changes_the_model(trial: tuple[Path, Said]) -> None:
    client, [run] = store_of(trial[0])
    folder = client.download_artifacts(run.info.run_id, "adapter", str(trial[0]))
    shapes = {
        key.removeprefix("model.architecture."): value
        for key, value in run.data.params.items()
        if "architecture." in key
    }
    base = _tiny_base(shapes)
    ids = torch.arange(40).unsqueeze(0)
    before = base(input_ids=ids).logits
    after = PeftModel.from_pretrained(base, folder)(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=1e-5)


def _tiny_base(shapes: dict[str, str]) -> Any:
    from transformers import AutoModelForCausalLM

    architecture: dict[str, Any] = {}
    for key, value in shapes.items():
        node = architecture
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value if leaf in ("model_type", "rope_type") else json.loads(value.lower())
    config = load_architecture(ModelConfig(source=ModelSource.tiny, weights=Weights.random, architecture=architecture))
    return AutoModelForCausalLM.from_config(config)


def test_a_run_folder_holds_the_whole_record(trial: tuple[Path, Said]) -> None:
    record = record_of(trial[0])
    assert record["params"]["seed"] == "3"
    [journal] = trial[0].glob("multirun/*/*/events.jsonl")
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    assert events[0] == {**events[0], "event": "Ready", "prepared": True}
    assert events[-1]["event"] == "Ended"


@pytest.mark.nightly
def test_loss_is_the_same_whether_a_step_is_cut_into_micro_batches_or_not(lab: Lab, tmp_path: Path) -> None:
    common = (*TINY, "precision=fp32", "method=lora", "tracking=none", "measure.eval_rows=8")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, shape in ((whole, ("batch_size=4",)), (cut, ("batch_size=2", "grad_accum_steps=2"))):
        folder.mkdir()
        assert lab(*common, *shape, cwd=folder).code == 0
    losses = [[p["value"] for p in record_of(f)["series"] if p["key"] == "step/loss"] for f in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert record_of(whole)["metrics"]["loss/eval"] == pytest.approx(record_of(cut)["metrics"]["loss/eval"], abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        ("data.batching=packed", "gradient_checkpointing=full", "max_grad_norm=0"),
        pytest.param(
            ("data.batching=seq_len", "attention=eager", "method.dropout=0.1", "measure.eval_rows=0"),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ("isolation=inline", "measure.warmup_steps=0", "method.raise_to_fp32=true", "data=random_tokens"),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=lambda changes: changes[0],
)
def test_it_finishes_in_every_layout(lab: Lab, tmp_path: Path, changes: tuple[str, ...]) -> None:
    said = lab(*TINY, "tracking=none", *changes)
    assert said.code == 0, said.text
    metrics = record_of(tmp_path)["metrics"]
    assert metrics["throughput/tokens_per_second"] > 0
    if "data.batching=packed" in changes:
        assert metrics["tokens/real_share"] > 0.8
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.nightly
def test_a_users_own_yaml_is_one_more_option(lab: Lab, tmp_path: Path) -> None:
    own = tmp_path / "own" / "optimizer"
    own.mkdir(parents=True)
    (own / "sgd.yaml").write_text("target: torch.optim.SGD\nargs: {momentum: 0.9}\n")
    said = lab("--config-dir", "own", *TINY, "optimizer=sgd")
    assert said.code == 0, said.text
    _, [run] = store_of(tmp_path)
    assert run.data.params["optimizer"] == "sgd"
    assert run.data.tags["ran.optimizer_class"] == "torch.SGD"


def test_a_users_own_rows(lab: Lab, tmp_path: Path) -> None:
    rows = [{"asked": f"What is {n} + 1?", "answered": str(n + 1)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = "data.map={instruction: asked, output: answered}"
    said = lab(*TINY, "data=jsonl", "data.path=rows.jsonl", columns, "tracking=none")
    assert said.code == 0, said.text
    assert record_of(tmp_path)["metrics"]["data/rows_train"] == 36


def test_real_weights_learn_from_the_shipped_rows(lab: Lab, tmp_path: Path) -> None:
    """The default model, converted from its package into an empty cache, with the default data and method, as
    `make run` trains it on a CPU."""
    short = ("precision=fp32", "measure=quick", "measure.eval_rows=2", "measure.general_rows=1", "measure.answers=1")
    said = lab(*short, "seq_len=96", "batch_size=1", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert said.code == 0, said.text
    for words in (
        "measuring the device's matrix products (first time only)",
        "converting the weights (first time only)",
    ):
        assert words in said.err
    record = record_of(tmp_path)
    assert record["metrics"]["loss/eval"] < record["metrics"]["loss/eval_before"] < 6
    [adapter] = tmp_path.glob("multirun/*/*/adapter/adapter_config.json")
    assert json.loads(adapter.read_text())["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_local_model_with_its_own_tokenizer(lab: Lab, tmp_path: Path) -> None:
    save_tiny(tmp_path / "mine")
    said = lab("model=local", "model.path=mine", "measure=quick", "seq_len=128", "tracking=none")
    assert said.code == 0, said.text
    assert record_of(tmp_path)["params"]["model.path"] == "mine"
    too_long = lab("model=local", "model.path=mine", "seq_len=5000", "tracking=none")
    assert (too_long.code, "beyond the model's 4096 positions" in too_long.err) == (2, True), too_long.text


def test_pickled_weights_are_never_loaded(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    save_tiny(folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    said = lab("model=local", "model.path=mine", "measure=quick")
    assert said.code == 2, said.text
    assert "safetensors" in said.err
    assert store_of(tmp_path)[1] == [], "no run is left behind"


def test_a_diverging_trial_is_a_recorded_result(lab: Lab, tmp_path: Path) -> None:
    sgd = ("optimizer.optim=null", "optimizer.target=torch.optim.SGD", "learning_rate=1e38", "max_grad_norm=0")
    said = lab(*TINY, *sgd)
    assert said.code == 3, said.text
    _, [run] = store_of(tmp_path)
    assert run.data.tags["outcome"] == "diverged"
    assert "the training loss was nan at step" in run.data.tags["reason"]
    assert "throughput/tokens_per_second" not in run.data.metrics
    assert run.data.tags["absent.throughput/tokens_per_second"]


@pytest.mark.nightly  # by day test_sweep_faults.py runs workers out of memory in six ways
def test_running_out_of_memory_is_a_recorded_result(tmp_path: Path) -> None:
    limit = 64 * 2**30  # of address space, for every process of the trial; the embedding alone asks for 5 TB
    done = subprocess.run(
        [sys.executable, "-m", "lora_lab", *TINY, "model.architecture.vocab_size=10000000000"],
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    _, [run] = store_of(tmp_path)
    assert (run.data.tags["outcome"], run.data.tags["phase"]) == ("out_of_memory", "model")


def test_a_password_in_an_address_is_refused_and_kept_nowhere(lab: Lab, tmp_path: Path) -> None:
    said = lab(*TINY, "tracking=server", "tracking.uri=http://me:hunter2@127.0.0.1:9")
    assert (said.code, "MLFLOW_TRACKING_PASSWORD" in said.err, "hunter2" in said.text) == (2, True, False), said.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


def test_the_parent_never_imports_torch_in_a_whole_trial(trial: tuple[Path, Said]) -> None:
    modules = set((trial[0] / "modules.txt").read_text().splitlines())
    assert "lora_lab.trial.session" in modules
    assert not {"torch", "transformers", "peft", "bitsandbytes"} & modules


@pytest.mark.gpu
def test_a_card_is_used_and_measured(tmp_path: Path) -> None:
    lab = lab_in(tmp_path, real=True)
    said = lab(*TINY, "measure.steps=200", "optimizer=paged_adamw", "precision=fp16")
    assert said.code == 0, said.text
    [record] = records_in(tmp_path)
    tags, metrics = record["tags"], record["metrics"]
    assert (tags["ran.grad_scaler"], tags["ran.autocast"], tags["stand_ins"]) == ("True", "fp16", "none")
    assert metrics["vram/peak_device_gib"] > metrics["vram/peak_allocated_gib"] > 0
    assert metrics["energy/joules_per_token"] > 0
