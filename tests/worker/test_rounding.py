"""Weights in bf16 whose updates are rounded at random: what is learnt, what the optimizer sees, and what is kept."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killed_jobs import assert_it_goes_on_to_the_same_weights
from safetensors.torch import load_file
from tiny_trials import tiny_config, train
from transformers import Adafactor

from lora_lab.base_weights import MODEL
from lora_lab.composition.validation import faults
from lora_lab.config import TrialConfig
from lora_lab.events import Event, ModelCounted, OptimizerMemory, Ran, Step
from lora_lab.fit.optimizer import optimizer_state, trained_weights
from lora_lab.fit.shapes import shapes_of
from lora_lab.method_config import MethodConfig
from lora_lab.options import DType, MethodKind, PlacementKind, Projection
from lora_lab.worker import in_backward, rounding
from lora_lab.worker.in_backward import InBackward
from lora_lab.worker.low_rank import Projected, Space
from lora_lab.worker.rounding import Rounded, round_into

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@given(st.floats(width=32, allow_nan=False), st.integers(0, 2**31))
def test_a_number_becomes_one_of_its_two_neighbours(number: float, seed: int) -> None:
    torch.manual_seed(seed)
    exact = torch.full((50,), number)
    bits = exact.view(torch.int32) & -(1 << 16)
    towards_zero = bits.view(torch.float32)
    beyond = (bits + (1 << 16)).view(torch.float32)
    held = torch.empty(50, dtype=torch.bfloat16)
    round_into(held, exact.clone())
    found = held.float()
    if torch.equal(towards_zero, exact):
        assert torch.equal(found, exact)
    else:
        assert ((found == towards_zero) | (found == beyond)).all()


def test_what_is_no_number_stays_so() -> None:
    bits = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)  # all ones, too
    for _ in range(20):
        held = torch.empty(5, dtype=torch.bfloat16)
        round_into(held, bits.clone().view(torch.float32))
        assert held.isinf().tolist() == [True, True, False, False, False]
        assert held.isnan().tolist() == [False, False, True, True, True]


def test_updates_that_are_too_small_for_bf16_add_up_to_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the step between two numbers of bf16. The spread of the mean is 0.0039 * sqrt(100 * 0.01 * 0.99)
    / sqrt(20000), a 4,000th of what is learnt; the bounds are ten times as wide."""
    monkeypatch.setattr(rounding, "_AT_ONCE", 4096)  # several parts, the last of them shorter
    torch.manual_seed(0)
    update = 2**-7 / 100

    class Ours(Rounded, torch.optim.SGD):
        pass

    learnt = {}
    for kind in (Ours, torch.optim.SGD):
        weight = torch.nn.Parameter(torch.full((20_000,), 1.25, dtype=torch.bfloat16))
        optimizer = kind([weight], lr=update)
        for _ in range(100):
            weight.grad = torch.full_like(weight, -1.0)
            optimizer.step()
        learnt[kind] = weight.detach().float().mean().item() - 1.25
    assert learnt[torch.optim.SGD] == 0
    assert learnt[Ours] == pytest.approx(100 * update, rel=0.0275)


OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adafactor": (Adafactor, {"lr": 1e-2, "relative_step": False, "scale_parameter": True}),
    "8 bit": (bitsandbytes.optim.AdamW8bit, {"lr": 1e-2, "min_8bit_size": 64}),
    "galore": (type("Low", (Projected, torch.optim.AdamW), {}), {"lr": 1e-2}),
}


def tensors_of(optimizer: Any) -> list[torch.Tensor]:
    states = [optimizer.state[weight] for group in optimizer.param_groups for weight in group["params"]]
    return [state[name] for state in states for name in sorted(state) if torch.is_tensor(state[name])]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_optimizer_sees_fp32_and_its_update_is_rounded_once(name: str) -> None:
    kind, arguments = OPTIMIZERS[name]
    torch.manual_seed(0)
    shapes = [(64, 96), (128,), (96, 64), (64, 8)]
    start = [torch.randn(shape).bfloat16() for shape in shapes]
    gradients = [torch.randn(shape).bfloat16() for shape in shapes]

    def stepped(made: type, dtype: torch.dtype) -> tuple[list[torch.Tensor], Any]:
        weights = [torch.nn.Parameter(each.clone().to(dtype)) for each in start]
        optimizer = made(weights, **arguments)
        if name == "galore":
            optimizer.project(Space(Projection.galore, 16, 100), [weights[0], weights[2]])
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.to(dtype)
        optimizer.step()
        return [weight.detach() for weight in weights], optimizer

    exact, of_fp32 = stepped(kind, torch.float32)
    held, of_bf16 = stepped(type("Ours", (Rounded, kind), {}), torch.bfloat16)
    for one, other, before in zip(exact, held, start, strict=True):
        assert other.dtype is torch.bfloat16
        assert not torch.equal(other, before)
        step = 2.0 ** torch.floor(torch.log2(one.abs())) / 128
        assert ((other.float() - one).abs() < step).all()
    pairs = list(zip(tensors_of(of_fp32), tensors_of(of_bf16), strict=True))
    assert pairs
    assert all(one.dtype is other.dtype and torch.equal(one, other) for one, other in pairs)

    saved = of_bf16.state_dict()
    again = type("Ours", (Rounded, kind), {})([torch.nn.Parameter(each) for each in held], **arguments)
    again.load_state_dict(saved)
    assert all(torch.equal(one, other) for one, other in zip(tensors_of(again), tensors_of(of_bf16), strict=True))


def full_config(held_in: DType = DType.bf16, **more: Any) -> TrialConfig:
    config = tiny_config(kind=MethodKind.full, held_in=held_in)
    config.precision.dtype, config.batch_size, config.learning_rate = DType.bf16, 2, 1e-3
    return replace(config, **more)


def only(events: list[Event], kind: type) -> Any:
    [found] = [event for event in events if isinstance(event, kind)]
    return found


def test_a_trial_learns_as_in_fp32_and_says_how_its_weights_were_held(tmp_path: Path) -> None:
    losses = {}
    for held_in in (DType.fp32, DType.bf16):
        config = full_config(held_in, max_grad_norm=0.0)
        config.optimizer.in_backward, config.measure.steps = True, 12
        events = train(config, tmp_path / held_in.name)
        losses[held_in] = [event.loss for event in events if isinstance(event, Step)]
    facts, counted = only(events, Ran).facts, only(events, ModelCounted)
    assert (facts["adapter_dtypes"].split()[0], facts["optimizer_rounding"]) == ("bfloat16", "random")
    assert counted.weight_bytes == 2 * counted.weight_elements
    assert only(events, OptimizerMemory).total_bytes == (
        optimizer_state(config.optimizer, trained_weights(config.method, shapes_of(config.model))).total
    )
    saved = load_file(tmp_path / "bf16" / MODEL / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    learnt = losses[DType.fp32][0] - losses[DType.fp32][-1]
    assert learnt > 1
    assert losses[DType.bf16][-1] == pytest.approx(losses[DType.fp32][-1], abs=0.05 * learnt)


@pytest.mark.nightly
def test_a_job_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    assert_it_goes_on_to_the_same_weights(full_config(), tmp_path)


def test_within_the_backward_one_weight_at_a_time_is_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_backward, "SMALL", 0)

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(sum(p.dtype is torch.float32 for p in layers.parameters()))
            return super().step(closure)

    class Ours(InBackward, Rounded, Watched):
        pass

    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(3)))
    seen: list[int] = []
    Ours(layers.parameters(), lr=0.1)
    before = [weight.clone() for weight in layers.parameters()]
    layers(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    assert max(seen) <= 1
    assert all(not torch.equal(old, new) for old, new in zip(before, layers.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method.held_in": DType.fp16}, "Use method.held_in=bf16 or fp32."),
        ({"precision.dtype": DType.fp32}, "Use precision=bf16, or method.held_in=fp32."),
        ({"precision.dtype": DType.fp16}, "Use precision=bf16, or method.held_in=fp32."),
        ({"placement.kind": PlacementKind.ddp, "placement.workers": 2}, "Use placement=one."),
        ({"method": MethodConfig(held_in=DType.bf16)}, "use method=full"),
    ],
)
def test_what_it_cannot_be_with_is_refused_with_what_to_type(change: dict[str, Any], said: str) -> None:
    config = full_config()
    assert faults(config) == []
    for key, value in change.items():
        *groups, last = key.split(".")
        setattr(getattr(config, groups[0]) if groups else config, last, value)
    assert any(said in fault for fault in faults(config)), faults(config)
