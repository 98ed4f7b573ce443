"""Layers that are given the very same tensor are calculated as one, with PEFT's own results."""

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import compiles, some_by_day
from engine_models import (
    adapted,
    adapters,
    furthest,
    groups,
    loss_and_gradients,
    nothing_is_kept,
    pack,
    padded,
    stepped,
)
from torch import Tensor

from lora_lab.worker.engines import fused_lora
from lora_lab.worker.engines.attention_masks import leave_out_masks
from lora_lab.worker.engines.compiled import compilations, compile_layers
from lora_lab.worker.engines.fused_lora import is_apart
from lora_lab.worker.engines.fused_lora_layers import use_fused_lora

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
SHAPES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}


@pytest.fixture(params=[1, 2**40], ids=["apart", "together"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With results, and slopes, as tensors of their own, and as one."""
    monkeypatch.setattr(fused_lora, "_FILLED", request.param)


@pytest.fixture(params=[True, False], ids=["each thin product", "both in one call"])
def thin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(fused_lora, "reads_once", lambda *_: True)
        monkeypatch.setattr(fused_lora, "lora_gradients", both)


def both(slopes: Tensor, b: Tensor, lora_hidden: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """What the kernel finds."""
    assert all(given.is_contiguous() for given in (slopes, b, lora_hidden))
    return scaling * slopes @ b, slopes.t() @ lora_hidden


@pytest.mark.usefixtures("ways", "thin")
@pytest.mark.parametrize("packed", [True, False], ids=["4 bits", "whole"])
@pytest.mark.parametrize(
    ("kind", "width"),
    some_by_day([("llama", 20), ("llama", 96), ("qwen2", 20), ("qwen2", 96)], by_day=[("llama", 20), ("qwen2", 96)]),
)
def test_loss_and_gradients_are_pefts(kind: str, packed: bool, width: int) -> None:
    few, plain = adapted(kind, **SHAPES), adapted(kind, **SHAPES)
    for model in (few, plain):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        if packed:
            pack(model, torch.float32)
    batch = padded([width, width - 7], width)
    with torch.compiler.set_stance("force_eager"):
        step = stepped(few, torch.float32)
        assert groups(few) == [ATTENTION, MLP] * 3
        step.record(batch)
        loss, expected = loss_and_gradients(plain, batch)
        found, gradients = loss_and_gradients(few, batch)
    assert found == pytest.approx(loss, rel=1e-6)
    assert furthest(gradients, expected) < 1e-5
    assert nothing_is_kept(few)


@compiles
@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("nested", some_by_day([True, False], by_day=[False]))
@pytest.mark.parametrize("values", [4, 2], ids=["whole blocks of scales", "blocks across layers"])
def test_packed_weights_lie_in_one_and_stay_what_they_were(nested: bool, values: int) -> None:
    """One kernel then unpacks them; bitsandbytes' own way over the parts is what evaluation takes."""
    shapes = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": values, "intermediate_size": 256}
    few, plain = adapted(**shapes), adapted(**shapes)
    for model in (few, plain):
        pack(model, torch.float32, nested)
    batch = padded([40, 33], 40)
    step = stepped(few, torch.float32)
    firsts = [module for module in few.modules() if getattr(module, "others", None)]
    layers = [len(first.weights) // (3 * len(first.blocks)) for first in firsts]
    assert layers == [3 if nested and values == 2 else 1, 1] * 2
    for first in firsts:
        shared = {layer.base_layer.weight.untyped_storage().data_ptr() for layer in [first, *first.others]}
        assert len(shared) == (1 if len(first.weights) <= 6 else 3)
    for module, other in zip(few.modules(), plain.modules(), strict=True):
        if hasattr(module, "others"):
            x = torch.randn(3, module.in_features)
            assert torch.equal(module.base_layer(x), other.base_layer(x))
    compiled = nested and values == 4  # one of them is enough
    if compiled:
        leave_out_masks(few)
        compile_layers(few)
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        step.record(batch)
        _, expected = loss_and_gradients(plain, batch)
        assert furthest(loss_and_gradients(few, batch)[1], expected) < 1e-4


@pytest.mark.nightly
@compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.usefixtures("ways", "traced")
def test_one_compilation_serves_all_layers() -> None:
    took = []
    batch = padded([40, 33], 40)
    for layers in (1, 3):
        torch._dynamo.reset()
        few, plain = (adapted("qwen2", **{**SHAPES, "num_hidden_layers": layers}) for _ in range(2))
        leave_out_masks(few)
        step = stepped(few, torch.float32)
        assert groups(few) == [ATTENTION, MLP] * layers
        compile_layers(few)
        before = compilations()
        step.record(batch)
        took.append(compilations() - before)
        _, expected = loss_and_gradients(plain, batch)
        assert furthest(loss_and_gradients(few, batch)[1], expected) < 1e-4
        assert nothing_is_kept(few)
        assert compilations() - before == took[-1]
    assert took[0] == took[1] > 0


@compiles
@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_with_checkpointing_gradients_are_the_same(compiled: bool) -> None:
    """Layers run twice then, and stop the second time when all that the backward needs is there."""
    few, plain = adapted(**SHAPES), adapted(**SHAPES)
    batch = padded([40, 33], 40)
    _, expected = loss_and_gradients(plain, batch)
    leave_out_masks(few)
    few.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    few.get_base_model().enable_input_require_grads()
    step = stepped(few, torch.float32)
    assert groups(few) == [ATTENTION, MLP] * 3
    if compiled:
        compile_layers(few)
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        step.record(batch)
        _, gradients = loss_and_gradients(few, batch)
    assert furthest(gradients, expected) < 1e-4
    assert nothing_is_kept(few)


@pytest.mark.usefixtures("ways")
def test_no_activation_outlives_its_step() -> None:
    model = adapted(**SHAPES)
    copies = use_fused_lora(model, torch.float32)
    seen: list[weakref.ref[Tensor]] = []

    def note(_: Any, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        seen.extend([weakref.ref(inputs[0]), weakref.ref(result)])

    hooks = [m.register_forward_hook(note) for m in model.modules() if hasattr(m, "others")]
    loss = model(**padded([40, 33], 40)).loss
    torch.autograd.grad(loss, list(copies.values()))
    for hook in hooks:
        hook.remove()
    del loss
    gc.collect()
    assert len(seen) == 2 * 7 * 3
    assert all(one() is None for one in seen)


@pytest.mark.parametrize("values", [4, 2], ids=["v as wide as q", "narrow v"])
def test_no_more_is_kept_for_the_backward_than_by_single_layers(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    """Attention keeps v: as a part of q, k and v in one tensor it would keep all of them."""
    shapes = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": values, "intermediate_size": 256}
    kept = {}
    for filled in (1, 2**40):
        monkeypatch.setattr(fused_lora, "_FILLED", filled)
        model = adapted(**shapes)
        use_fused_lora(model, torch.float32)
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(**padded([40, 33], 40)).loss
        kept[filled] = sum(storages.values())
        del loss
    assert kept[2**40] <= 1.02 * kept[1]


def test_working_copies_are_blocks_of_the_present_adapters() -> None:
    model = adapted(**SHAPES)
    copies = use_fused_lora(model, torch.bfloat16)
    assert len(copies) == 0, "weights in another format"
    copies = use_fused_lora(model, torch.float32)
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.add_(1)
    copies.refresh()
    for module in model.modules():
        if getattr(module, "others", None):
            layers = [module, *module.others]
            assert torch.equal(module.stacked_b, torch.block_diag(*(x.lora_B["default"].weight for x in layers)))
            assert torch.equal(module.stacked_a, torch.cat([x.lora_A["default"].weight for x in layers]))


def test_narrow_layers_have_few_rows_together() -> None:
    """Of Qwen2.5-1.5B: keys and values are 256 wide, the MLP 8960."""
    assert not is_apart(2048, [1536, 256, 256])
    assert is_apart(2048, [8960, 8960])
    assert not is_apart(512, [8960, 8960])
    assert is_apart(32768, [1536, 256, 256])
    assert not is_apart(10**9, [8960]), "a layer by itself"
