"""A layer and its adapter as few products: PEFT's own result and gradients, however the work is laid out."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from conftest import compiles, some_by_day
from engine_models import adapted, adapters, furthest, loss_and_gradients, pack, padded, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from lora_lab.worker.engines import dequantize
from lora_lab.worker.engines.attention_masks import leave_out_masks
from lora_lab.worker.engines.compiled import compilations, compile_layers
from lora_lab.worker.engines.dequantize import use_fused_dequantization
from lora_lab.worker.engines.fused_lora import widens
from lora_lab.worker.engines.fused_lora_layers import FusedLoraLinear, FusedLoraLinear4bit, use_fused_lora


class Lone(torch.nn.Module):
    """One layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(rows, inputs) to (rows, outputs)."""
        result: Tensor = self.layer(x)
        return result


def lone(layer: Any, rank: int, **asked: Any) -> Any:
    made = get_peft_model(Lone(layer), LoraConfig(r=rank, target_modules=["layer"], **asked))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters(made).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.train()


def slopes(model: Any, x: Tensor, used: dict[Tensor, Tensor]) -> list[Tensor]:
    """The result, and the gradients over x and the adapter, of a sum with weights of its own."""
    x = x.clone().requires_grad_()
    result = model(x)
    over = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    leaves = [used.get(p, p) for p in adapters(model).values()]
    return [result.detach(), *torch.autograd.grad((result * over).sum(), [x, *leaves])]


def assert_same_as_pefts(model: Any, x: Tensor, kind: type) -> None:
    expected = slopes(model, x, {})
    copies = use_fused_lora(model, x.dtype)
    assert [type(m) for m in model.modules() if isinstance(m, kind)] == [kind]
    assert len(copies) == 2
    for one, other in zip(slopes(model, x, copies), expected, strict=True):
        # sums over hundreds of rows cancel: their rounding is that of the largest
        close = (
            {"rtol": 1e-9, "atol": 1e-4} if x.dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5 * size_of(other)}
        )
        torch.testing.assert_close(one, other, **close)


def size_of(tensor: Tensor) -> float:
    return max(1.0, float(tensor.abs().max()))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    rank=st.integers(1, 9) | st.just(16),
    bias=st.booleans(),
    alpha=st.sampled_from([1, 3, 16]),
)
def test_a_plain_layer(rows: int, inputs: int, outputs: int, rank: int, bias: bool, alpha: int) -> None:
    layer = torch.nn.Linear(inputs, outputs, bias, dtype=torch.float64)
    model = lone(layer, rank, lora_alpha=alpha, use_rslora=bias)
    for parameter in adapters(model).values():
        parameter.data = parameter.data.double()
    assert_same_as_pefts(model, torch.randn(rows, inputs, dtype=torch.float64), FusedLoraLinear)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 256), (256, 64), (128, 128), (66, 128)])
@pytest.mark.parametrize("rows", [9, 200])
def test_a_packed_layer(inputs: int, outputs: int, rows: int, nested: bool) -> None:
    """Wider, narrower, and as wide as what it is given, with few rows and many: each way is taken, in the forward and
    in the backward."""
    torch.manual_seed(0)
    with torch.compiler.set_stance("force_eager"):
        model = lone(torch.nn.Linear(inputs, outputs), 8, lora_alpha=24)
        pack(model, torch.float32, nested)
        assert_same_as_pefts(model, torch.randn(2, rows, inputs), FusedLoraLinear4bit)


def test_a_packed_layer_with_bytes_across_rows_stays_pefts() -> None:
    model = lone(torch.nn.Linear(65, 64), 8)
    pack(model, torch.float32)
    kind = type(model.base_model.model.layer)
    assert use_fused_lora(model, torch.float32) == {}
    assert type(model.base_model.model.layer) is kind


@compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("dtype", "nested"),
    some_by_day(
        product([torch.bfloat16, torch.float16, torch.float32], [True, False]),
        by_day=[(torch.float32, False)],
    ),
)
def test_unpacked_weights_are_bitsandbytes_own_bits(dtype: torch.dtype, nested: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    torch._dynamo.reset()
    model = lone(torch.nn.Linear(128, 64), 8)
    pack(model, torch.float32, nested)
    base = model.base_model.model.layer.base_layer
    state = base.weight.quant_state
    (state.state2.absmax if nested else state.absmax)[:1] = torch.nan
    (state.state2.absmax if nested else state.absmax)[1:2] = torch.inf
    expected = dequantize_4bit(base.weight.data, state).to(dtype)
    for columns in (0, 8):
        beside = torch.full((64, columns), 7, dtype=dtype) if columns else None
        matrix = dequantize.dequantized(
            [dequantize.packed_weight(base)[0]], dequantize.packed_weight(base)[1], 128, dtype, beside
        )
        assert matrix.dtype is dtype
        assert torch.equal(matrix[:, :128].nan_to_num(nan=5), expected.nan_to_num(nan=5))
        assert bool((matrix[:, 128:] == 7).all())


def test_which_way_is_cheaper() -> None:
    """Of Qwen2.5-1.5B's MLP: up, down, and a layer as wide as what it is given."""
    assert widens(2048, 1536, 8960, 16)
    assert not widens(512, 1536, 8960, 16), "the weight has more rows than there are"
    assert not widens(2048, 8960, 1536, 16)
    assert not widens(2048, 1536, 1536, 16)
    assert not widens(2048, 1536, 8960, 4), "rows would begin at 3,080 bytes"


def test_merged_or_switched_off_it_is_pefts() -> None:
    model = lone(torch.nn.Linear(8, 12), 2)
    use_fused_lora(model, torch.float32)
    x = torch.randn(3, 8)
    summed = model(x).detach()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.base_model.model.layer.base_layer(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), summed)


@pytest.mark.parametrize(
    "asked",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}],
    ids=["dropout", "DoRA", "a bias of the adapter"],
)
def test_what_is_more_than_a_sum_stays_pefts(asked: dict[str, Any]) -> None:
    model = lone(torch.nn.Linear(8, 12), 2, **asked)
    assert use_fused_lora(model, torch.float32) == {}


def test_a_weight_in_another_format_stays_pefts() -> None:
    """Autocast converts it each time; the product here would not."""
    assert use_fused_lora(lone(torch.nn.Linear(8, 12), 2), torch.bfloat16) == {}


def test_evaluation_uses_what_was_learned_and_not_its_copy() -> None:
    model = lone(torch.nn.Linear(8, 12), 2)
    copies = use_fused_lora(model, torch.float32)
    with torch.no_grad():
        for copy in copies.values():
            copy.zero_()
    x = torch.randn(3, 8)
    fresh = lone(torch.nn.Linear(8, 12), 2)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))
        model.eval()
        fresh.eval()
        assert torch.equal(model(x), fresh(x))


def test_a_step_sees_every_change_of_the_adapters() -> None:
    changed, plain = adapted(), adapted()
    step = stepped(changed, torch.float32)
    batch = padded([40, 33], 40)
    step.record(batch)
    for _ in range(3):
        loss, expected = loss_and_gradients(plain, batch)
        found, gradients = loss_and_gradients(changed, batch)
        assert found == pytest.approx(loss, rel=1e-5)
        assert furthest(gradients, expected) < 1e-4
        assert all(gradient.dtype is torch.float32 for gradient in gradients.values())
        for model in (changed, plain):
            with torch.no_grad():
                for name, parameter in adapters(model).items():
                    parameter.sub_(expected[name], alpha=0.5)
    assert step.replays == 3


def test_what_is_saved_names_no_copies() -> None:
    model = adapted()
    before = set(model.state_dict())
    stepped(model, torch.bfloat16)
    assert set(model.state_dict()) == before
    assert len(adapters(model)) == len(adapters(adapted()))


@compiles
@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("packed", some_by_day([True, False], by_day=[False]), ids=["4 bits", "16 bits"])
def test_gradients_in_bf16_are_as_near_to_fp32_as_pefts(packed: bool) -> None:
    """Compiled, over layers that are wider, narrower and as wide as what they are given."""
    shapes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    exact, eager, few = (adapted("qwen2", **shapes) for _ in range(3))
    for model in (eager, few):
        for name, parameter in model.named_parameters():
            if name not in adapters(model):
                parameter.data = parameter.data.to(torch.bfloat16)
        if packed:
            pack(model, torch.bfloat16)
    for name, module in exact.named_modules():  # the same frozen weights, after their rounding
        if hasattr(module, "base_layer"):
            module.base_layer.weight.data = whole_weight(eager.get_submodule(name).base_layer)
    leave_out_masks(few)
    if packed:
        use_fused_dequantization(few)
    step = stepped(few, torch.bfloat16)
    compile_layers(few)
    before = compilations()
    step.record(padded([96, 96], 96))
    once = compilations()
    off = {"eager": 0.0, "few": 0.0}
    for seed in range(3):
        batch = padded([96, 96], 96, seed=seed)
        _, truth = loss_and_gradients(exact, batch)
        size = sum(float(gradient.square().sum()) for gradient in truth.values())
        for name, model in (("eager", eager), ("few", few)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            found = {n: parameter.grad for n, parameter in adapters(model).items()}
            off[name] += sum(float((found[n] - truth[n]).square().sum()) for n in truth) / size
            model.zero_grad()
    assert compilations() == once > before, "one compilation serves all layers and steps"
    assert step.replays == 3
    assert 0 < off["few"] < 1.3 * off["eager"]
    assert off["eager"] < 3 * 0.1**2


def whole_weight(base: Any) -> Tensor:
    if not hasattr(base.weight, "quant_state"):
        weight: Tensor = base.weight.data.float()
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dequantized: Tensor = dequantize_4bit(base.weight.data, base.weight.quant_state)
    return dequantized.to(torch.bfloat16).float()


@compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_too_many_shapes_are_an_error_in_the_backwards_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps its settings by thread from 2.13 on; unpacked step by step, it would be slow in silence."""
    monkeypatch.setattr(dequantize, "MOST_COMPILATIONS", 2)

    def unpack_three_shapes() -> str:
        for columns in (1, 2, 3):
            model = lone(torch.nn.Linear(64, 64 * columns), 8)
            pack(model, torch.float32, nested=False)
            packed, blocks = dequantize.packed_weight(model.base_model.model.layer.base_layer)
            dequantize.dequantized([packed], blocks, 64, torch.float32)
        return "nothing was said"

    with ThreadPoolExecutor(1) as other, pytest.raises(FailOnRecompileLimitHit):
        other.submit(unpack_three_shapes).result()
