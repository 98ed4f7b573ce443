"""Variants of LoRA through whole trials: what is saved, next to the model as it was, is the model that was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_trials import ended, tiny_config
from transformers import set_seed

from lora_lab.composition.variants import variant_faults
from lora_lab.config import TrialConfig
from lora_lab.events import Event, Ran, Step
from lora_lab.options import Init, MethodKind
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.stages import model_loading, saving
from lora_lab.worker.trained import load_trained
from lora_lab.worker.trainables.start import before_training
from lora_lab.worker.trial import run_trial

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]

CPU = torch.device("cpu")
IDS = torch.arange(3, 35).reshape(2, 16)

VARIANTS: dict[str, dict[str, Any]] = {
    "gaussian": {"init": Init.gaussian},
    "orthogonal": {"init": Init.orthogonal},
    "pissa": {"init": Init.pissa},
    "pissa_rslora": {
        "init": Init.pissa,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 5.0},
    },
    "olora": {"init": Init.olora},
    "eva": {"init": Init.eva},
    "lora_fa": {"freeze_a": True},
    "lora_plus": {"b_learning_rate_ratio": 8.0},
    "vera": {"kind": MethodKind.vera},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3.0}},
}


class Ran_:
    def __init__(self, config: TrialConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.model: Any = None
        saved = saving.trainable_of

        def keep(asked: TrialConfig) -> Any:
            return saved(asked)

        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        load = model_loading.load_model

        def loaded(*args: Any) -> Any:
            self.model = load(*args)
            return self.model

        monkeypatch.setattr(model_loading, "load_model", loaded)
        run_trial(config, folder, self.events.append)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base(config: TrialConfig) -> Any:
    set_seed(config.seed)
    plain = tiny_config()
    return load_model(plain, load_architecture(plain.model), CPU).unload()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_saved_adapter_on_the_model_as_it_was_is_the_model_that_was_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**{"rank": 4, **VARIANTS[name]})
    assert variant_faults(config) == []
    ran = Ran_(config, tmp_path, monkeypatch)
    assert ended(ran.events) == ("finished", "")
    live = logits(ran.model)
    untouched = logits(base(config))
    assert (live - untouched).abs().max() > 1e-3
    for model in (
        PeftModel.from_pretrained(base(config), tmp_path / "adapter"),
        load_trained(config, tmp_path / "adapter", CPU),
    ):
        assert torch.allclose(logits(model), live, atol=2e-5)
        with model.disable_adapter():
            assert torch.allclose(logits(model), untouched, atol=1e-6)
    with before_training(ran.model):
        assert torch.allclose(logits(ran.model), untouched, atol=2e-5)
    assert torch.equal(logits(ran.model), live)
