"""What a trial leaves to use its result: an adapter that loads without a network, and which weights it belongs to."""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from huggingface_hub import constants
from peft import PeftConfig
from tiny_trials import ended, tiny_config

from lora_lab.base_weights import ADAPTER, WEIGHTS, BaseWeights
from lora_lab.config import InvalidInput, ModelConfig, PackageConfig, TrialConfig
from lora_lab.data_config import DataConfig
from lora_lab.events import Event, Warned
from lora_lab.files import write_json
from lora_lab.options import DataSource, ModelSource
from lora_lab.reading import whole
from lora_lab.worker.answers import Answerer
from lora_lab.worker.exact_weights import exact_weights
from lora_lab.worker.merging import Merger
from lora_lab.worker.stages import saving
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer
from lora_lab.worker.trained import on_its_weights
from lora_lab.worker.trial import run_trial

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my models") / "it's mine"
    save_tiny(folder)
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def with_text(model: ModelConfig | None = None) -> TrialConfig:
    config = tiny_config()
    return replace(
        config, model=model or config.model, data=DataConfig(source=DataSource.shipped, rows=20), seq_len=256
    )


def train(config: TrialConfig, folder: Path) -> tuple[list[Event], BaseWeights | None]:
    events: list[Event] = []
    run_trial(config, folder, events.append)
    assert ended(events) == ("finished", "")
    return events, whole(BaseWeights, folder / WEIGHTS)


def test_the_printed_command_loads_model_adapter_and_tokenizer(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    folder = tmp_path / 'a "trial" of mine'
    folder.mkdir()
    config = with_text(ModelConfig(source=ModelSource.local, path=model_folder.name))
    config.train.max_steps = 3
    _, weights = train(config, folder)
    assert weights is not None
    assert (
        weights.files["model.safetensors"]
        == hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    )
    assert weights.sha256
    assert str(model_folder) not in weights.named()
    assert PeftConfig.from_pretrained(folder / "adapter").base_model_name_or_path == str(model_folder)
    monkeypatch.chdir(tmp_path)
    python, interactive, c, code = shlex.split(weights.command(folder))
    assert (python, interactive, c) == ("python", "-i", "-c")
    there: dict[str, Any] = {}
    exec(code, there)
    assert there["tokenizer"].chat_template == tiny_tokenizer().chat_template
    asked = there["tokenizer"]("How?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tuned = there["model"](asked).logits
        with there["model"].disable_adapter():
            base = there["model"](asked).logits
    assert not torch.equal(tuned, base)


def test_a_trial_of_random_tokens_has_no_tokenizer_and_random_weights_no_command(tmp_path: Path) -> None:
    _, weights = train(tiny_config(), tmp_path)
    assert weights == BaseWeights(source="random")
    assert weights.command(tmp_path) == ""
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    assert not list((tmp_path / "adapter").glob("tokenizer*"))


def test_a_tokenizer_that_does_not_fit_on_the_disk_costs_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.os, "posix_fallocate", full)
    events, _ = train(with_text(), tmp_path)
    assert any("tokenizer was not saved" in event.text for event in events if isinstance(event, Warned))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_weights_of_a_package_are_named_by_it() -> None:
    package = PackageConfig(name="some-model", version="1.2", file="model.gguf", sha256="a" * 64)
    found = exact_weights(ModelConfig(source=ModelSource.package, id="org/model", package=package), digest=False)
    assert (found.package, found.sha256, found.id) == ("some-model==1.2", "a" * 64, "org/model")
    assert found.folder.endswith("some-model-1.2-aaaaaaaaaaaa")
    assert "some-model==1.2" in found.named()


@pytest.fixture
def hub_cache(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Put the tiny model into a cache of the hub's, as org/model; its commit."""

    def put() -> str:
        commit, repository = "c" * 40, tmp_path / "hub" / "models--org--model"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / commit).symlink_to(model_folder)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return commit

    return put


def test_weights_of_the_hub_are_named_by_their_commit(hub_cache: Callable[[], str]) -> None:
    commit = hub_cache()
    found = exact_weights(ModelConfig(source=ModelSource.hub, id="org/model"), digest=False)
    assert (found.commit, found.named()) == (commit, f"org/model at commit {commit}")
    assert Path(found.folder, "config.json").is_file()


def test_a_hub_model_that_is_not_cached_says_so() -> None:
    found = exact_weights(ModelConfig(source=ModelSource.hub, id="org/nowhere"), digest=False)
    assert (found.commit, found.folder) == ("", "")
    assert "cache" in found.named()


def test_a_window_does_not_read_a_folder_through(model_folder: Path) -> None:
    found = exact_weights(ModelConfig(source=ModelSource.local, path=str(model_folder)), digest=False)
    assert (found.sha256, found.files) == ("", {})
    assert "job" in found.named()


def test_another_byte_in_a_folder_is_another_digest(model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    [one, same] = [
        exact_weights(ModelConfig(source=ModelSource.local, path=str(folder)), digest=True).sha256
        for folder in (model_folder, copy)
    ]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    other = exact_weights(ModelConfig(source=ModelSource.local, path=str(copy)), digest=True).sha256
    assert one == same != other


def test_a_job_does_not_go_on_with_other_weights(tmp_path: Path) -> None:
    events: list[Event] = []
    write_json(tmp_path / WEIGHTS, asdict(BaseWeights(source="hub", id="org/model", commit="c0ffee")))
    run_trial(replace(tiny_config(), resume=True), tmp_path, events.append)
    outcome, why = ended(events)
    assert outcome == "refused"
    assert "org/model at commit c0ffee" in why
    assert "random weights" in why


def test_an_adapter_is_not_put_on_other_weights_than_it_was_trained_on(model_folder: Path, tmp_path: Path) -> None:
    base, trial = tmp_path / "base", tmp_path / "trial"
    shutil.copytree(model_folder, base)
    trial.mkdir()
    config = with_text(ModelConfig(source=ModelSource.local, path=str(base)))
    write_json(trial / WEIGHTS, asdict(exact_weights(config.model, digest=True)))
    assert on_its_weights(config, trial / ADAPTER) == (config, "")
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    for use in (
        lambda: Merger(config, trial / ADAPTER, lambda _: None),
        lambda: Answerer(config, trial / ADAPTER, as_conversations=True),
    ):
        with pytest.raises(InvalidInput, match=r"model\.safetensors\. Put those weights back"):
            use()


@pytest.mark.parametrize(("path", "said"), [("base", "where it was started"), ("/nowhere/base", "Put the base model")])
def test_a_base_model_that_is_not_found_from_here_is_not_looked_for_on_the_hub(
    tmp_path: Path, path: str, said: str
) -> None:
    config = TrialConfig(model=ModelConfig(source=ModelSource.local, path=path))
    with pytest.raises(InvalidInput, match=said):
        on_its_weights(config, tmp_path / ADAPTER)


def test_an_adapter_of_a_branch_is_put_on_the_commit_it_was_trained_on(tmp_path: Path) -> None:
    config = with_text(ModelConfig(source=ModelSource.hub, id="org/model", revision="main"))
    assert on_its_weights(config, tmp_path / ADAPTER) == (config, "the trial noted no weights")  # an older one
    write_json(tmp_path / WEIGHTS, asdict(BaseWeights(source="hub", id="org/model", commit="c0ffee")))
    found, unchecked = on_its_weights(config, tmp_path / ADAPTER)
    assert (found.model.revision, unchecked) == ("c0ffee", "")
    assert replace(found, model=config.model) == config


def test_weights_that_a_window_did_not_digest_are_said_to_be_unchecked(model_folder: Path, tmp_path: Path) -> None:
    config = with_text(ModelConfig(source=ModelSource.local, path=str(model_folder)))
    write_json(tmp_path / WEIGHTS, asdict(exact_weights(config.model, digest=False)))
    found, unchecked = on_its_weights(config, tmp_path / ADAPTER)
    assert found == config
    assert "job" in unchecked
