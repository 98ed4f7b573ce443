"""Another method than LoRA through a whole trial: what is counted, read back and saved is what it trains."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_trials import ended, tiny_config

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.events import Event, ModelCounted, Ran, Step
from lora_lab.worker import models, readback
from lora_lab.worker.models import check_model, load_architecture
from lora_lab.worker.stages import saving
from lora_lab.worker.trainables.trainable import Trainable, base_of, trained_parameters
from lora_lab.worker.trial import run_trial

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]


class OneProjection:
    """Trains the weights that are named, as they are, with nothing wrapped around the model."""

    name = "trained"
    dtype = torch.float32
    files = ("trained.safetensors", "trained.json")

    def __init__(self, ending: str) -> None:
        self._ending = ending

    def loads_in(self, working: torch.dtype) -> torch.dtype:
        return working

    def check(self, skeleton: Any) -> None:
        if not any(name.endswith(self._ending) for name, _ in skeleton.named_parameters()):
            raise InvalidInput(f"the model has no {self._ending}")

    def build(self, model: Any, unreached: Sequence[str]) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(self._ending))
        return model

    def write(self, model: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / self.files[0])

    def load(self, model: Any, folder: Path) -> None:
        model.load_state_dict(load_file(folder / self.files[0]), strict=False)


@pytest.fixture
def train_by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have every trial train by this method."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def put(method: Trainable) -> None:
        for module in (models, readback, saving):
            monkeypatch.setattr(module, "trainable_of", lambda _: method)

    return put


@pytest.mark.parametrize("chunked_loss", [False, True])
def test_another_method_is_trained_counted_read_back_and_saved(
    train_by: Any, tmp_path: Path, chunked_loss: bool
) -> None:
    train_by(OneProjection("down_proj.weight"))
    config = tiny_config()
    config.engine.chunked_loss = chunked_loss
    events: list[Event] = []
    run_trial(config, tmp_path, events.append)
    assert ended(events) == ("finished", "")
    shapes = config.model.architecture or {}
    weights = shapes["num_hidden_layers"] * shapes["hidden_size"] * shapes["intermediate_size"]
    [counted] = [event for event in events if isinstance(event, ModelCounted)]
    assert counted.trainable == weights
    [ran] = [event for event in events if isinstance(event, Ran)]
    assert ran.facts["trainable_parameters"] == str(weights)
    assert ran.facts["adapter_dtypes"] == f"float32 {weights}"
    assert ran.facts["chunked_loss"] == str(chunked_loss)
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert losses[-1] < losses[0]
    saved = load_file(tmp_path / "trained" / "trained.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == weights
    assert not (tmp_path / "adapter").exists()


def test_weights_in_another_format_than_the_methods_are_no_measurement(train_by: Any, tmp_path: Path) -> None:
    method = OneProjection("down_proj.weight")
    method.dtype = torch.bfloat16
    train_by(method)
    events: list[Event] = []
    run_trial(tiny_config(), tmp_path, events.append)
    outcome, reason = ended(events)
    assert outcome == "failed"
    assert re.search("asked for bfloat16, got float32", reason)


def test_a_model_that_a_method_cannot_train_is_refused_before_it_is_loaded(train_by: Any) -> None:
    train_by(OneProjection("nowhere.weight"))
    config: TrialConfig = tiny_config()
    with pytest.raises(InvalidInput, match=r"no nowhere\.weight"):
        check_model(config, load_architecture(config.model))


def test_what_is_trained_is_listed_also_while_an_engine_answers_for_the_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model.parameters = lambda *_: iter(())  # type: ignore[method-assign, assignment]
    assert [id(p) for p in trained_parameters(model)] == [id(model[1].weight), id(model[1].bias)]
    assert base_of(model) is model
