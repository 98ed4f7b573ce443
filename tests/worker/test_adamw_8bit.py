"""AdamW with its state in 8 bit: what a code is, what is learnt, what is kept, and what a trial says of it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from hypothesis import given, settings
from hypothesis import strategies as st
from killed_jobs import assert_it_goes_on_to_the_same_weights
from tiny_trials import tiny_config, train

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.events import OptimizerMemory, Ran, Step
from lora_lab.fit.optimizer import is_known, optimizer_state, trained_weights
from lora_lab.fit.shapes import shapes_of
from lora_lab.method_config import OptimizerConfig
from lora_lab.options import DType, MethodKind
from lora_lab.worker import adamw_8bit
from lora_lab.worker.adamw_8bit import AdamW8bit
from lora_lab.worker.dynamic_codes import Maps, decoded, dynamic_maps, encode_into
from lora_lab.worker.in_backward import InBackward
from lora_lab.worker.rounding import rounded_by_place
from lora_lab.worker.training import check_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]
TARGET = "lora_lab.worker.adamw_8bit.AdamW8bit"
SIGNED = 0, True
UNSIGNED = 1, False


@pytest.fixture(scope="module")
def maps() -> Maps:
    return dynamic_maps(torch.device("cpu"))


# what a code is


@pytest.mark.parametrize(("row", "is_signed"), [SIGNED, UNSIGNED])
def test_each_number_gets_the_code_of_the_nearest(maps: Maps, row: int, is_signed: bool) -> None:
    """A search over bitsandbytes' map says which: at random places, at all midpoints and next to them."""
    numbers = create_dynamic_map(signed=is_signed)
    middles = (numbers[1:] + numbers[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(200_000, generator=generator) * 10 ** (-9 * torch.rand(200_000, generator=generator))
    nearby = [torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0)]
    every = torch.cat([spread, -spread, numbers, middles, *nearby])
    every = every if is_signed else every.abs()
    blocks = torch.nn.functional.pad(every, (0, -len(every) % 255)).view(-1, 255)
    blocks = torch.nn.functional.pad(blocks, (0, 1), value=1.0)  # so that the scale is 1
    codes, scales = torch.empty_like(blocks, dtype=torch.uint8), torch.empty(len(blocks))
    encode_into(codes, scales, blocks, maps.lowest[row], maps.midpoints[row])
    assert (scales == 1).all()
    assert torch.equal(codes.long(), torch.bucketize(blocks, middles))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(-30, 30), st.floats(0, 12), st.sampled_from([SIGNED, UNSIGNED]))
def test_what_is_kept_is_within_half_a_step_of_the_map(
    maps: Maps, seed: int, size: float, spread: float, kind: tuple[int, bool]
) -> None:
    """Blocks of any size, whose elements differ by up to twelve powers of ten. Below the lowest number is the scale's
    last one, and what fp32 loses by dividing and multiplying."""
    row, is_signed = kind
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(3, 256, generator=generator) * 10 ** (size - spread * torch.rand(3, 256, generator=generator))
    exact = exact if is_signed else exact.abs()
    codes, scales = torch.empty(3, 256, dtype=torch.uint8), torch.empty(3)
    encode_into(codes, scales, exact, maps.lowest[row], maps.midpoints[row])
    assert torch.equal(scales, exact.abs().amax(1))
    numbers = create_dynamic_map(signed=is_signed)
    gaps = torch.nn.functional.pad(numbers.diff(), (1, 1))  # the steps below and above each number
    gaps[0], gaps[-1] = 2 * (numbers[0] + 1) if is_signed else 0, 0  # -1 has no code of its own
    at = codes.long()
    bound = torch.maximum(gaps[at], gaps[at + 1]) / 2 * scales[:, None]
    off = (decoded(codes, scales, maps.numbers[row]) - exact).abs()
    assert (off <= bound * (1 + 1e-5) + 1e-6 * exact.abs()).all()


def test_a_block_of_zeros_stays_zero_next_to_others(maps: Maps) -> None:
    exact = torch.zeros(2, 256)
    exact[1] = 1e-30
    for row in (0, 1):
        codes, scales = torch.empty(2, 256, dtype=torch.uint8), torch.empty(2)
        encode_into(codes, scales, exact, maps.lowest[row], maps.midpoints[row])
        found = decoded(codes, scales, maps.numbers[row])
        assert (found[0] == 0).all()
        assert (found[1] == exact[1]).all()


def test_what_is_no_number_is_not_hidden(maps: Maps) -> None:
    exact = torch.ones(1, 256)
    exact[0, 7] = torch.nan
    codes, scales = torch.empty(1, 256, dtype=torch.uint8), torch.empty(1)
    encode_into(codes, scales, exact, maps.lowest[0], maps.midpoints[0])
    assert decoded(codes, scales, maps.numbers[0]).isnan().any()


# how a weight in bf16 is rounded


def rounded(exact: torch.Tensor, key: int, step: int) -> torch.Tensor:
    return rounded_by_place(exact, torch.tensor(key, dtype=torch.int32), torch.tensor(float(step)))


@pytest.mark.parametrize("cut", [1, 655, 32_768, 65_535])
def test_the_mean_of_what_is_rounded_is_the_number_itself(cut: int) -> None:
    """Over places, weights and steps alike. A mean's spread is known; the bounds are five times as wide."""
    number = (torch.tensor(1.25).view(torch.int32) + cut).view(torch.float32)
    count, part = 1 << 18, cut / (1 << 16)
    for found in (
        rounded(number.expand(count).contiguous(), 3, 9),
        torch.stack([rounded(number.expand(64).contiguous(), key, 1) for key in range(1, count >> 6, 16)]),
        torch.stack([rounded(number.expand(64).contiguous(), 1, step) for step in range(1, count >> 6, 16)]),
    ):
        assert set(found.unique().tolist()) <= {1.25, 1.2578125}
        ups = (found > 1.25).double().mean().item()
        assert abs(ups - part) <= 5 * (part * (1 - part) / found.numel()) ** 0.5 + 1 / found.numel()


def test_random_numbers_do_not_repeat_from_weight_to_weight_and_step_to_step() -> None:
    half = (torch.tensor(1.25).view(torch.int32) + 32_768).view(torch.float32).expand(1 << 16).contiguous()
    chosen = [rounded(half, key, step) > 1.25 for key, step in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (1000, 1))]
    for place, one in enumerate(chosen):
        for other in chosen[:place]:
            assert abs((one == other).double().mean().item() - 0.5) < 0.02
        assert abs((one[1:] == one[:-1]).double().mean().item() - 0.5) < 0.02


def test_infinities_and_what_is_no_number_stay_so() -> None:
    bits = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1, 0], dtype=torch.int32)
    for step in range(20):
        found = rounded(bits.view(torch.float32), 1, step).bfloat16()
        assert found.isinf().tolist() == [True, True, False, False, False, False]
        assert found.isnan().tolist() == [False, False, True, True, True, False]


# what is learnt


GIVEN: dict[str, Any] = {"lr": 5e-3, "betas": (0.8, 0.95)}


def net_of(dtype: torch.dtype = torch.float32, last: int = 65) -> Any:
    """Two weights with codes, three biases, and one weight that is no whole number of blocks; or small with last=33."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64), torch.nn.Linear(64, last)
    return torch.nn.Sequential(*layers).to(dtype)


def groups_of(net: Any) -> list[dict[str, Any]]:
    named = dict(net.named_parameters())
    return [
        {"params": [each for name, each in named.items() if name.endswith("weight")], "weight_decay": 0.3},
        {"params": [each for name, each in named.items() if name.endswith("bias")], "weight_decay": 0.0},
    ]


def backward(net: Any, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(128, 64, generator=generator)
    found = net(x.to(net[0].weight.dtype)).float()[:, :33]
    loss = (found - (x.roll(1, 1).abs() - 0.5)[:, :33]).square().mean()
    loss.backward()
    return loss.item()


def trained(net: Any, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = GIVEN["lr"] * (1 - step / 80)
        losses.append(backward(net, step))
        optimizer.step()
        net.zero_grad()
    return losses


@pytest.mark.parametrize(("dtype", "loss", "apart"), [(torch.float32, 2e-4, 0.02), (torch.bfloat16, 6e-4, 0.04)])
def test_it_learns_as_adamw_in_fp32_does(dtype: torch.dtype, loss: float, apart: float) -> None:
    """The bounds are about twice what was seen. bf16 itself cannot be nearer to most weights than a 256th."""
    net = net_of()
    exact = trained(net, torch.optim.AdamW(groups_of(net), **GIVEN), range(50))
    other = net_of(dtype)
    found = trained(other, AdamW8bit(groups_of(other), **GIVEN), range(50))
    assert exact[-1] < 0.8 * exact[0]
    assert found == pytest.approx(exact, rel=loss)
    for one, held in zip(net.parameters(), other.parameters(), strict=True):
        assert held.dtype is dtype
        assert (held.float() - one).square().mean().sqrt() < apart * one.square().mean().sqrt()


def test_one_step_is_adamws_but_for_the_rounding_of_fp32() -> None:
    """Of the state only zeros are read, so nothing is lost yet."""
    found = []
    for kind in (torch.optim.AdamW, AdamW8bit):
        net = net_of()
        trained(net, kind(groups_of(net), **GIVEN), range(1))
        found.append(list(net.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_updates_that_are_too_small_for_bf16_add_up_to_what_they_are() -> None:
    """A hundredth of the step between two numbers of bf16; with equal gradients AdamW moves by the learning rate. The
    second weight is small, and has its state in fp32. The bounds are ten times the spread of the mean."""
    torch.manual_seed(0)
    rate = 2**-7 / 100
    weights = [torch.nn.Parameter(torch.full((size,), 1.25, dtype=torch.bfloat16)) for size in (20_480, 4000)]
    optimizer = AdamW8bit(weights, lr=rate)
    for _ in range(100):
        for weight in weights:
            weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
    learnt = [weight.detach().float().mean().item() - 1.25 for weight in weights]
    assert learnt[0] == pytest.approx(100 * rate, rel=0.09), "the map has no -1, see docs/methods.md"
    assert learnt[1] == pytest.approx(100 * rate, rel=0.06)


def test_weights_and_steps_have_random_numbers_of_their_own() -> None:
    weights = [torch.nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW8bit(weights, lr=2**-9)
    moved = []
    for _ in range(2):
        for weight in weights:
            weight.data.fill_(1)
            weight.grad = torch.full_like(weight, 1.0)
        optimizer.step()
        moved += [weight.detach() < 1 for weight in weights]
    shares = [one.double().mean().item() for one in moved]
    assert all(0.1 < share < 0.999 for share in shares), shares
    for number, one in enumerate(moved):
        for other in range(number):
            apart = (one ^ moved[other]).double().mean().item()
            chance = shares[number] + shares[other] - 2 * shares[number] * shares[other]
            assert apart == pytest.approx(chance, rel=0.1)


def states_of(optimizer: Any) -> list[dict[str, Any]]:
    return [optimizer.state[weight] for group in optimizer.param_groups for weight in group["params"]]


def assert_same(one: Any, other: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True))
    for a, b in zip(states_of(one[1]), states_of(other[1]), strict=True):
        assert a.keys() == b.keys()
        for name, each in a.items():
            assert torch.equal(each, b[name]) if torch.is_tensor(each) else each == b[name]
            assert not torch.is_tensor(each) or each.dtype is b[name].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = net_of(dtype)
    optimizer = AdamW8bit(groups_of(whole), **GIVEN)
    trained(whole, optimizer, range(3))
    torch.save((whole.state_dict(), optimizer.state_dict(), torch.get_rng_state()), tmp_path / "saved")
    trained(whole, optimizer, range(3, 6))

    weights, state, chance = torch.load(tmp_path / "saved", weights_only=True)
    again = net_of(dtype)
    torch.manual_seed(5)  # the trial's seed is not what it goes on by
    other = AdamW8bit(groups_of(again), **GIVEN)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    torch.set_rng_state(chance)
    trained(again, other, range(3, 6))
    assert_same((whole, optimizer), (again, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_the_backward_and_by_parts_it_is_what_it_is_behind_and_whole(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of 5 blocks: weights have 32, so that the last one is shorter."""
    found = []
    for kind, at_once in ((AdamW8bit, 1 << 16), (type("Ours", (InBackward, AdamW8bit), {}), 5)):
        monkeypatch.setattr(adamw_8bit, "_AT_ONCE", at_once)
        net = net_of(dtype, last=33)
        optimizer = kind(groups_of(net), **GIVEN)
        trained(net, optimizer, range(4))
        found.append((net, optimizer))
    assert_same(*found)


def test_within_the_backward_no_weight_looks_through_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for each weight with codes, and small ones are updated together: their number costs next to nothing."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any, **more: Any) -> None:
            calls.append(name)
            real(*given, **more)

        return call

    monkeypatch.setattr(adamw_8bit, "update", counted("coded", adamw_8bit.update))
    monkeypatch.setattr(adamw_8bit, "adamw", counted("small", adamw_8bit.adamw))
    net = net_of()
    optimizer: Any = type("Ours", (InBackward, AdamW8bit), {})(groups_of(net), **GIVEN)
    backward(net, 0)
    assert calls == ["small", "coded", "coded"]  # the first is of 4,160 elements, which are no whole blocks
    optimizer.step()
    assert calls[3:] == ["small"]


@pytest.mark.parametrize("args", [{"betas": [0.9, 1.0]}, {"betas": [0.9]}, {"eps": -1.0}, {"beta": 0.9}])
def test_arguments_that_do_not_fit_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"optimizer\.args"):
        check_optimizer(OptimizerConfig(target=TARGET, args=args))


# what a card runs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_does_what_a_cpu_does_and_holds_nothing(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    for blocks in (1, 16, 300, 1001):
        compare_steps(blocks, dtype, device)
    given = [each.to(device) for each in start_of(1 << 12, dtype)]
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        adamw_8bit.update_by_kernel(*given)
    assert torch.cuda.max_memory_allocated() == before


def start_of(blocks: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The arguments of a first step."""
    generator = torch.Generator().manual_seed(blocks)
    weight, gradient = (torch.randn(blocks, 256, generator=generator).to(dtype) for _ in range(2))
    codes = torch.full((blocks, 256), 127, dtype=torch.uint8), torch.zeros(blocks, 256, dtype=torch.uint8)
    state = [codes[0], torch.zeros(blocks), codes[1], torch.zeros(blocks)]
    scalars = torch.tensor([0.99, 1e-1, 10.0, 1e-8, 0.1, 0.01, 1.0])
    key = torch.tensor(blocks, dtype=torch.int32)
    return [weight, gradient, *state, key, *dynamic_maps(torch.device("cpu")), scalars]


@torch.no_grad()
def compare_steps(blocks: int, dtype: torch.dtype, device: torch.device) -> None:
    """Take four steps, each from the CPU's state. A compiler may contract products and sums, so a last bit may differ,
    and where it decides, a code by one and a weight by one step of bf16."""
    ours = start_of(blocks, dtype)
    torch.manual_seed(blocks)
    for step in range(1, 5):
        ours[1] = torch.randn(blocks, 256).to(dtype)
        ours[1][0, 7] = math.nan if step == 4 else 0.0
        ours[-1] = torch.tensor([0.99, 1e-2 / (1 - 0.9**step), (1 - 0.99**step) ** -0.5, 1e-8, 0.1, 0.01, step])
        theirs = [each.to(device, copy=True) for each in ours]
        adamw_8bit.update(*ours)
        adamw_8bit.update_by_kernel(*theirs)
        here = [each.cpu() for each in theirs]
        apart = (here[0].float() - ours[0].float()).abs()
        assert torch.equal(apart.isnan(), ours[0].isnan())
        assert apart.isnan().any() == (step == 4)
        of_one_bit = 2.0**-7 if dtype is torch.bfloat16 else 1e-5
        assert (apart.nan_to_num() <= ours[0].nan_to_num().float().abs() * of_one_bit + 1e-6).all()
        assert (apart > 0).sum() <= 1 + apart.numel() * (0.001 if dtype is torch.bfloat16 else 0.5)
        for codes in (2, 4):
            assert (here[codes].int() - ours[codes].int()).abs().max() <= 1
            assert (here[codes] != ours[codes]).sum() <= 1 + apart.numel() / 1000
            torch.testing.assert_close(here[codes + 1], ours[codes + 1], rtol=1e-6, atol=0, equal_nan=True)


# what a trial says


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def full_config(held_in: DType = DType.bf16, **optimizer: Any) -> TrialConfig:
    config = tiny_config(kind=MethodKind.full, held_in=held_in)
    config.precision.dtype, config.batch_size, config.learning_rate, config.max_grad_norm = DType.bf16, 2, 1e-3, 0.0
    config.optimizer = OptimizerConfig(target=TARGET, **optimizer)
    return config


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("held_in", "rounding"), [(DType.bf16, "random"), (DType.fp32, "nearest")])
def test_a_trial_says_what_ran_and_holds_the_state_that_was_calculated(
    tmp_path: Path, held_in: DType, rounding: str
) -> None:
    config = full_config(held_in, in_backward=True)
    events = train(config, tmp_path)
    [facts] = [event.facts for event in events if isinstance(event, Ran)]
    ran = [facts[f"optimizer_{name}"] for name in ("class", "bits", "rounding", "in_backward", "paged")]
    assert ran == ["lora_lab.AdamW8bit", "8", rounding, "True", "False"]
    [held] = [event.total_bytes for event in events if isinstance(event, OptimizerMemory)]
    assert is_known(config.optimizer)
    assert held == optimizer_state(config.optimizer, trained_weights(config.method, shapes_of(config.model))).total
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("on_the_cpu")
def test_a_job_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    assert_it_goes_on_to_the_same_weights(full_config(in_backward=True), tmp_path)
