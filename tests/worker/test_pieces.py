"""An optimizer that gets large weights in pieces learns what it would with whole ones."""

from typing import Any

import pytest
import torch

from lora_lab.worker import pieces
from lora_lab.worker.in_backward import InBackward
from lora_lab.worker.pieces import InPieces

KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 100)


def model_of(dtype: torch.dtype = torch.float32) -> Any:
    """An embedding of 3 pieces whose last is shorter, a layer of one piece exactly, one below that."""
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(23, 10), torch.nn.Linear(10, 10), torch.nn.Linear(10, 3)]
    return torch.nn.Sequential(*layers).to(dtype)


def groups_of(model: Any) -> list[dict[str, Any]]:
    """As Trainer makes them: weights that decay, and those that do not."""
    named = dict(model.named_parameters())
    wide = [each for name, each in named.items() if name.endswith("weight")]
    return [
        {"params": wide, "weight_decay": 0.1},
        {"params": [each for name, each in named.items() if name.endswith("bias")], "weight_decay": 0.0},
    ]


def backward(model: Any, step: int) -> None:
    ids = torch.arange(step, step + 8) % 23
    model(ids).square().sum().backward()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_learn_what_whole_weights_do(name: str, dtype: torch.dtype) -> None:
    kind, given = KINDS[name]
    found = []
    for made in (kind, type("InPieces", (InPieces, kind), {})):
        model = model_of(dtype)
        optimizer = made(groups_of(model), **given)
        for step in range(5):
            backward(model, step)
            optimizer.step()
            model.zero_grad()
        found.append(model.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_step_sees_no_more_than_a_piece_at_a_time() -> None:
    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.extend(p.numel() for group in self.param_groups for p in group["params"] if p.grad is not None)
            super().step(closure)

    seen: list[int] = []
    model = model_of()
    optimizer: Any = type("InPieces", (InPieces, Watched), {})(groups_of(model), lr=0.1)
    backward(model, 0)
    optimizer.step()
    assert sorted(seen) == [3, 10, 30, 30, 100, 100, 100]
    held = [piece.grad for own in optimizer.pieces.values() if len(own) > 1 for piece in own]
    assert held == [None, None, None], "the gradient would be kept by its pieces"


def test_pieces_are_updated_within_the_backward() -> None:
    found = []
    for mixed in ((torch.optim.AdamW,), (InBackward, InPieces, torch.optim.AdamW)):
        model = model_of()
        optimizer = type("Mixed", mixed, {})(groups_of(model), lr=1e-2)
        for step in range(3):
            backward(model, step)
            optimizer.step()
            if len(mixed) > 1:
                assert all(weight.grad is None for weight in model.parameters())
            model.zero_grad()
        found.append(model.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_saved_state_goes_on() -> None:
    kind = type("InPieces", (InPieces, torch.optim.AdamW), {})
    model = model_of()
    optimizer = kind(groups_of(model), lr=1e-2)
    saved: Any = None
    for step in range(6):
        if step == 3:
            saved = {name: each.clone() for name, each in model.state_dict().items()}, optimizer.state_dict()
            saved[1]["state"] = {n: {k: v.clone() for k, v in s.items()} for n, s in saved[1]["state"].items()}
        backward(model, step)
        optimizer.step()
        model.zero_grad()
    again = model_of()
    other = kind(groups_of(again), lr=1e-2)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for step in range(3, 6):
        backward(again, step)
        other.step()
        again.zero_grad()
    assert all(torch.equal(model.state_dict()[key], again.state_dict()[key]) for key in again.state_dict())
