"""Gradient descent on weights in bf16: what is learnt, what is kept, and what a trial says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from killed_jobs import assert_it_goes_on_to_the_same_weights
from tiny_trials import tiny_config, train

from lora_lab.config import TrialConfig
from lora_lab.events import OptimizerMemory, Ran, Step
from lora_lab.method_config import OptimizerConfig
from lora_lab.options import DType, MethodKind
from lora_lab.worker import descent
from lora_lab.worker.descent import RoundedDescent
from lora_lab.worker.in_backward import InBackward

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]


class Ours(RoundedDescent, torch.optim.SGD):
    pass


class Within(InBackward, Ours):
    pass


def test_updates_that_are_too_small_for_bf16_add_up_to_what_they_are() -> None:
    """A hundredth of the step between two numbers of bf16. The spread of the mean is a 4,000th of what is learnt; the
    bounds are ten times as wide. The small weight is updated with another one."""
    torch.manual_seed(0)
    rate = 2**-7 / 100
    weights = [torch.nn.Parameter(torch.full((size,), 1.25, dtype=torch.bfloat16)) for size in (20_000, 4000, 90)]
    optimizer = Ours(weights, lr=rate)
    for _ in range(100):
        for weight in weights:
            weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
    learnt = [weight.detach().float().mean().item() - 1.25 for weight in weights]
    assert learnt[0] == pytest.approx(100 * rate, rel=0.0275)
    assert learnt[1] == pytest.approx(100 * rate, rel=0.06)
    assert learnt[2] == pytest.approx(100 * rate, rel=0.4)


def net_of() -> Any:
    """A weight of its own, one of a whole part and more, and four small ones."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 80), torch.nn.GELU(), torch.nn.Linear(80, 64), torch.nn.Linear(64, 9)
    return torch.nn.Sequential(*layers).bfloat16()


def groups_of(net: Any) -> list[dict[str, Any]]:
    named = dict(net.named_parameters())
    return [
        {"params": [each for name, each in named.items() if name.endswith("weight")], "weight_decay": 0.3},
        {"params": [each for name, each in named.items() if name.endswith("bias")], "weight_decay": 0.0},
    ]


def trained(net: Any, optimizer: Any, steps: range) -> Any:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 10)
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        net(x).square().mean().backward()
        optimizer.step()
        net.zero_grad()
    return net


def assert_same(one: Any, other: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_each_step_is_that_of_fp32_rounded_to_one_of_two_neighbours() -> None:
    """At another learning rate each."""
    net, exact = net_of(), net_of().float()
    optimizer, theirs = Ours(groups_of(net), lr=0.5), torch.optim.SGD(groups_of(exact), lr=0.5)
    torch.manual_seed(1)
    for rate in (0.5, 0.05, 1.0):
        for group in (*optimizer.param_groups, *theirs.param_groups):
            group["lr"] = rate
        before = [weight.detach().clone() for weight in net.parameters()]
        for weight, other in zip(net.parameters(), exact.parameters(), strict=True):
            other.data = weight.detach().float()
            weight.grad = torch.randn(weight.shape).bfloat16()
            other.grad = weight.grad.float()
        optimizer.step()
        theirs.step()
        for weight, other, old in zip(net.parameters(), exact.parameters(), before, strict=True):
            assert not torch.equal(weight, old)
            apart = (weight.float() - other).abs()
            assert (apart <= other.abs() * 2**-7 + 1e-6).all()
            assert (apart > 0).double().mean() > 0.4


def test_a_weight_in_fp32_is_not_rounded_and_one_without_a_gradient_stays() -> None:
    torch.manual_seed(0)
    given = [torch.randn(size) for size in (5000, 9)]
    weights = [torch.nn.Parameter(each.clone()) for each in given]
    still = torch.nn.Parameter(torch.ones(9, dtype=torch.bfloat16))
    optimizer = Ours([*weights, still], lr=0.1, weight_decay=0.5)
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.3)
    optimizer.step()
    for weight, start in zip(weights, given, strict=True):
        torch.testing.assert_close(weight.detach(), start - 0.1 * (0.3 + 0.5 * start))
    assert (still == 1).all()


def test_within_the_backward_and_by_parts_it_is_what_it_is_behind_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kind, at_once in ((Ours, 1 << 24), (Within, 1000)):
        monkeypatch.setattr(descent, "_AT_ONCE", at_once)
        net = net_of()
        found.append(trained(net, kind(groups_of(net), lr=0.1), range(4)))
    assert_same(*found)


def test_a_saved_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = net_of()
    optimizer = Ours(groups_of(whole), lr=0.1)
    trained(whole, optimizer, range(3))
    torch.save((whole.state_dict(), optimizer.state_dict()), tmp_path / "saved")
    trained(whole, optimizer, range(3, 6))

    weights, state = torch.load(tmp_path / "saved", weights_only=True)
    again = net_of()
    torch.manual_seed(5)  # the trial's seed is not what it goes on by
    other = Ours(groups_of(again), lr=0.1)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    assert_same(whole, trained(again, other, range(3, 6)))


def test_weights_and_steps_have_random_numbers_of_their_own() -> None:
    weights = [torch.nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = Ours(weights, lr=2**-8)
    moved = []
    for _ in range(2):
        for weight in weights:
            weight.data.fill_(1)
            weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
        moved += [weight.detach() > 1 for weight in weights]
    for number, one in enumerate(moved):
        assert one.double().mean() == pytest.approx(0.5, abs=0.01)
        for other in moved[number + 1 :]:
            assert (one == other).double().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [1, 1000, 100_001])
def test_the_kernel_does_what_a_cpu_does_and_holds_nothing(elements: int) -> None:
    """A compiler may contract products and sums, so a last bit may differ, and where it decides, one step of bf16."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, elements).bfloat16()
    scalars = torch.tensor([0.99, 0.1, 3.0])
    theirs = [each.cuda() for each in (weight, gradient, scalars)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    descent.update_by_kernel(theirs[0], theirs[1], 2**31 - 5, theirs[2])
    assert torch.cuda.max_memory_allocated() == before
    descent.update(weight, gradient, 2**31 - 5, scalars)
    apart = (theirs[0].cpu().float() - weight.float()).abs()
    assert (apart <= weight.float().abs() * 2**-7 + 1e-6).all()
    assert (apart > 0).sum() <= 1 + elements / 1000


def full_config() -> TrialConfig:
    config = tiny_config(kind=MethodKind.full, held_in=DType.bf16)
    config.precision.dtype, config.batch_size, config.learning_rate, config.max_grad_norm = DType.bf16, 2, 0.1, 0.0
    config.optimizer = OptimizerConfig(optim="sgd", in_backward=True)
    return config


def test_a_trial_says_what_ran_and_holds_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    events = train(full_config(), tmp_path)
    [facts] = [event.facts for event in events if isinstance(event, Ran)]
    ran = [facts[f"optimizer_{name}"] for name in ("class", "bits", "rounding", "in_backward")]
    assert ran == ["torch.SGD", "32", "random", "True"]
    assert [event.total_bytes for event in events if isinstance(event, OptimizerMemory)] == [0]
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert losses[-1] < losses[0]


@pytest.mark.nightly
def test_a_job_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_it_goes_on_to_the_same_weights(full_config(), tmp_path)
