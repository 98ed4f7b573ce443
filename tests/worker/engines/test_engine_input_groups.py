"""Which layers are given the very same tensor, found without their names; and what happens where that changes."""

import functools
from typing import Any

import pytest
import torch
from engine_models import adapted, adapters, furthest, groups, nothing_is_kept
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_lab.worker.engines import fused_lora
from lora_lab.worker.engines.fused_lora_layers import use_fused_lora


@pytest.fixture(params=[1, 2**40], ids=["apart", "together"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With results, and slopes, as tensors of their own, and as one."""
    monkeypatch.setattr(fused_lora, "_FILLED", request.param)


class Siblings(nn.Module):
    """Three layers, of which the last is given a tensor of its own where `apart` says so."""

    def __init__(self, apart: bool, twice: bool) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 12), nn.Linear(8, 6, bias=False), nn.Linear(8, 12)
        self.apart, self.twice = apart, twice
        self.unused = self.changed = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., 8) to (..., 6)."""
        result: Tensor = self.two(x).mul_(2) + self.one(x)[..., :6]
        if self.changed:
            x.add_(1)
        last = self.three(x * 2 if self.apart else x)
        if self.twice:
            last = last + self.three(x)
        return result if self.unused else result + last[..., 6:]


class Model(nn.Module):
    """Two of them."""

    def __init__(self, *apart: bool, twice: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.parts = nn.ModuleList(Siblings(each, twice) for each in apart)
        self.between = nn.ModuleList(nn.Linear(6, 8) for _ in apart)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(rows, tokens) to (rows, tokens, 8)."""
        x: Tensor = self.embedding(input_ids)
        for part, between in zip(self.parts, self.between, strict=True):
            x = between(part(x))
        return x


def small(*apart: bool, rank: int = 2, **own: Any) -> Any:
    torch.manual_seed(0)
    made = get_peft_model(Model(*apart, **own), LoraConfig(r=rank, target_modules=["one", "two", "three"]))
    with torch.no_grad():
        for parameter in adapters(made).values():
            parameter.normal_()
    return made.train()


def gradients_of(model: Any, used: dict[Tensor, Tensor]) -> dict[str, Tensor]:
    result = model(input_ids=torch.arange(10).view(2, 5))
    over = torch.linspace(-1, 1, result.numel()).view_as(result)
    leaves = {name: used.get(p, p) for name, p in adapters(model).items()}
    found = torch.autograd.grad((result * over).sum(), list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}


def same_as_pefts(model: Any, change: Any = id) -> bool:
    """Whether gradients are, where `change` is made once groups were found."""
    copies = use_fused_lora(model, torch.float32)
    found = groups(model)
    change(model)
    gradients = gradients_of(model, copies)
    for module in model.modules():
        if hasattr(module, "others"):
            module.__class__ = module.__class__.__mro__[2]
    assert type(model.get_base_model().parts[0].one).__module__ == "peft.tuners.lora.layer"
    return groups(model) == found and furthest(gradients, gradients_of(model, {})) < 1e-5


@pytest.mark.usefixtures("ways")
def test_in_the_order_of_their_calls_and_changed_in_place() -> None:
    model = small(False, False)
    assert same_as_pefts(model)
    assert groups(model) == [["two", "one", "three"]] * 2


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (functools.partial(small, True, True), [["two", "one"]] * 2),
        (functools.partial(small, False, True), []),
        (functools.partial(small, False, False, twice=True), [["two", "one"]] * 2),
        (functools.partial(small, False, False, rank=64), []),
    ],
    ids=["one is given another", "not alike in all", "called twice", "too many ranks"],
)
def test_who_is_no_part_of_a_group(model: Any, expected: Any) -> None:
    made = model()
    assert same_as_pefts(made)
    assert groups(made) == expected


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("name", ["apart", "twice", "unused"])
def test_what_a_later_run_does_otherwise(name: str) -> None:
    """Given another tensor, called again, or calculated in vain: who is handed nothing of this x calculates."""

    def change(model: Any) -> None:
        for part in model.get_base_model().parts:
            setattr(part, name, True)

    model = small(False, False)
    assert same_as_pefts(model, change)
    assert groups(model) == [["two", "one", "three"]] * 2
    assert nothing_is_kept(model)


def test_layers_of_which_none_are_given_the_same() -> None:
    model = adapted("phi3")
    use_fused_lora(model, torch.float32)
    assert groups(model) == []


def test_the_probe_leaves_modes_and_hooks_as_they_were() -> None:
    model = adapted("qwen2", attention_dropout=0.1, lora={"r": 2})
    model.get_base_model().model.layers[1].eval()
    before = [(module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    state = torch.get_rng_state()
    use_fused_lora(model, torch.float32)
    assert [(module.training, len(module._forward_pre_hooks)) for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tensor_changed_in_place_is_another() -> None:
    model = small(False, False)
    for part in model.get_base_model().parts:
        part.changed = True
    use_fused_lora(model, torch.float32)
    assert groups(model) == [["two", "one"]] * 2


def test_a_model_that_two_tokens_are_not_enough_for_has_no_groups() -> None:
    model = small(False, False)
    whole = model.get_base_model().forward
    model.get_base_model().forward = lambda input_ids, images: whole(input_ids + images)
    use_fused_lora(model, torch.float32)
    assert groups(model) == []


def test_nothing_stays_handed_over_after_an_error() -> None:
    model = small(False, False)
    use_fused_lora(model, torch.float32)
    three = model.get_base_model().parts[1].three
    calls = three.forward
    three.forward = lambda x: x / "0"
    with pytest.raises(TypeError):
        model(input_ids=torch.arange(4).view(2, 2))
    three.forward = calls
    assert three.handed is not None
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(4).view(2, 2))
    assert nothing_is_kept(model)
