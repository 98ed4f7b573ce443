"""Random weights are as the model's own rule makes them, and never all there in full size at once."""

import weakref
from typing import Any

import pytest
import torch
from odd_models import SHAPES, trial
from transformers import AutoModelForCausalLM

from lora_lab.options import Quantization
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.random_weights import RandomTensor, random_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),
]
CPU = torch.device("cpu")


def base(name: str, seed: int = 0, **method: Any) -> dict[str, torch.Tensor]:
    targets = ["in_proj"] if name == "mamba" else ["all-linear"]
    config = trial(name, target_modules=targets, **method)
    torch.manual_seed(seed)
    model = load_model(config, load_architecture(config.model), CPU)
    return {n.replace("base_layer.", ""): p.detach() for n, p in model.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"bert"}))
def test_each_weight_is_spread_as_the_models_own_rule_spreads_it(name: str) -> None:
    architecture = load_architecture(trial(name).model)
    torch.manual_seed(3)
    reference = dict(AutoModelForCausalLM.from_config(architecture).named_parameters())
    made = {n.removeprefix("base_model.model."): p for n, p in base(name).items()}
    assert made.keys() == reference.keys()
    for key, parameter in made.items():
        expected = reference[key].detach()
        assert parameter.shape == expected.shape
        spread = float(expected.std()) if expected.numel() > 1 else 0.0
        near = 1e-6 + 6 * spread / expected.numel() ** 0.5
        assert float(parameter.float().mean()) == pytest.approx(float(expected.mean()), abs=near), key
        if expected.numel() > 200 and spread > 1e-6:
            assert 0.7 < float(parameter.float().std()) / float(expected.std()) < 1.4, key


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_the_seed_decides_them(name: str) -> None:
    one, same, other = base(name), base(name), base(name, seed=1)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_full_tensors_are_gone_when_the_next_ones_are_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under QLoRA the whole model in 16 bit would be four times what a small card has to hold."""
    alive: list[Any] = []
    most = 0
    real = RandomTensor.__getitem__

    def watched(self: RandomTensor, what: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(kept() is not None for kept in alive))
        made = real(self, what)
        if made.dim() == 2 and "embed" not in self._module and "lm_head" not in self._module:
            alive.append(weakref.ref(made.untyped_storage()))
        return made

    monkeypatch.setattr(RandomTensor, "__getitem__", watched)
    base(name, quantization=Quantization.nf4, mostly_unquantised=True)
    assert len(alive) >= 8
    if name != "falcon":  # its layers are of a class of its own, which stays in 16 bit
        assert most <= 2


def test_nothing_is_made_before_it_is_asked_for() -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(load_architecture(trial("llama").model))
    state = random_state(skeleton, CPU)
    assert state.keys() == {name for name, _ in skeleton.named_parameters()}
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert state["model.norm.weight"][...].tolist() == [1.0] * 64
