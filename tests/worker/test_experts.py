"""The stacked weights of a mixture of experts: in 4 bit under QLoRA, adapted under LoRA, in every such model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from odd_models import make, trial
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_lab.options import Quantization
from lora_lab.worker.experts import expert_weights
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.quantised import quantised_share
from lora_lab.worker.trainables.trainable import trained_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),
]
ROUTERS = "weight"
"""PEFT adapts the router of some mixtures too, as the linear layer that it was."""
CPU = torch.device("cpu")
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoehybrid"]
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def load(name: str, warned: list[str], folder: Path | None = None, **method: Any) -> Any:
    config = trial(name, folder, **method)
    torch.manual_seed(0)
    return load_model(config, load_architecture(config.model), CPU, warned.append)


def step(model: Any) -> list[str]:
    """One step of plain gradient descent; names of what is trained without a gradient."""
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    with torch.no_grad():
        for parameter in trained.values():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    return without


@pytest.mark.parametrize("name", MIXTURES)
def test_under_qlora_nearly_all_weights_are_in_4_bit(name: str) -> None:
    warned: list[str] = []
    model = load(name, warned, quantization=Quantization.nf4, double_quantization=True)
    assert 0.9 < quantised_share(model, trained_parameters(model)) <= 1.0
    assert ["get no adapter" in line for line in warned] == [True]
    assert step(model) == []
    first = float(model(input_ids=IDS, labels=IDS).loss.detach())
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = None
        step(model)
    assert float(model(input_ids=IDS, labels=IDS).loss.detach()) < first


@pytest.mark.parametrize("name", MIXTURES)
def test_a_stack_in_4_bit_is_what_bitsandbytes_makes_of_it(name: str, tmp_path: Path) -> None:
    """Unpacked it differs from the folder's weights by no more than NF4 rounds: a sixth of a block's largest. (Rows are
    whole blocks of 64 here: on the CPU bitsandbytes 0.50 unpacks others wrongly.)"""
    folder = make(name, tmp_path / name)
    plain = {
        (n, own): getattr(m, own).detach() for n, m, own in expert_weights(AutoModelForCausalLM.from_pretrained(folder))
    }
    model = load(name, [], folder, quantization=Quantization.nf4).get_base_model()
    modules = dict(model.named_modules())
    assert plain
    for (path, own), expected in plain.items():
        unpacked = getattr(modules[path], own).detach()
        assert unpacked.shape == expected.shape
        assert float((unpacked - expected).abs().max()) <= float(expected.abs().max()) / 6
        assert not torch.equal(unpacked, expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_under_lora_every_stack_has_an_adapter_that_learns_and_is_saved(name: str, tmp_path: Path) -> None:
    folder = make(name, tmp_path / name)
    warned: list[str] = []
    model = load(name, warned, folder)
    assert warned == []
    stacks = len(list(expert_weights(AutoModelForCausalLM.from_pretrained(folder))))
    adapted = [m for m in model.modules() if type(m).__name__ == "ParamWrapper" and m.parameter_name != ROUTERS]
    assert len(adapted) == stacks > 0
    assert step(model) == []
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with torch.no_grad():
        one, other = (m.eval()(input_ids=IDS).logits for m in (model, again))
    assert float((one - other).abs().max()) < 1e-5


def test_named_modules_are_adapted_and_nothing_else() -> None:
    model = load("mixtral", [], target_modules=["q_proj"])
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"q_proj"}
