"""Checkpointed layers: what is calculated once more, and what is not."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import compiles
from engine_models import adapted, loss_and_gradients, padded
from torch.profiler import ProfilerActivity, profile

from lora_lab.options import Checkpointing
from lora_lab.worker.engines.checkpointed_calls import checkpoint_layers
from lora_lab.worker.engines.compiled import checkpointing_of, compilations, compile_layers, decoder_layers
from lora_lab.worker.engines.fused_lora_layers import use_fused_lora
from lora_lab.worker.engines.offloaded_checkpoints import offload_checkpoints

LAYERS = 4
BATCH = padded([64, 50], 64)
ALL = {"target_modules": "all-linear"}


def products(run: Callable[[], Any]) -> int:
    """How many groups of linear layers are calculated: q, k and v; o; gate and up; down."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return Counter({event.key: event.count for event in seen.key_averages()})["lora_lab::onto_lora"]


def checkpointed(mode: Checkpointing, **model: Any) -> Any:
    torch.compiler.reset()  # or code that earlier tests have compiled would serve
    made = adapted(num_hidden_layers=LAYERS, lora=ALL, **model)
    use_fused_lora(made, torch.float32)
    compile_layers(made)
    if mode is Checkpointing.offloaded:
        offload_checkpoints(decoder_layers(made), torch.device("cpu"), False, within=True)
    else:
        checkpoint_layers(decoder_layers(made)[:: 2 if mode is Checkpointing.selective else 1], False, within=True)
    return made.train()


@compiles
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("mode", "again"),
    [
        (Checkpointing.full, 3 * LAYERS),
        (Checkpointing.offloaded, 3 * LAYERS),
        pytest.param(Checkpointing.selective, 3 * LAYERS // 2, marks=pytest.mark.nightly),
    ],
)
def test_the_last_product_of_a_compiled_layer_is_not_calculated_again(mode: Checkpointing, again: int) -> None:
    before, made = compilations(), checkpointed(mode)
    assert checkpointing_of(made) is mode
    made(**BATCH).loss.backward()
    assert compilations() - before == (2 if mode is Checkpointing.selective else 1), "one for all layers"
    kept: list[torch.Tensor] = []
    assert products(lambda: kept.append(made(**BATCH).loss)) == 4 * LAYERS
    assert products(lambda: kept[0].backward()) == again


@pytest.mark.nightly
@compiles
@pytest.mark.usefixtures("traced")
def test_the_last_product_is_calculated_again_where_the_backward_needs_it() -> None:
    """Gemma 3 has a norm behind its MLP, whose backward takes the MLP's output."""
    made = checkpointed(Checkpointing.full, kind="gemma3_text")
    made(**BATCH).loss.backward()
    loss = made(**BATCH).loss
    assert products(loss.backward) == 4 * LAYERS


@compiles
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param("llama", Checkpointing.offloaded, marks=pytest.mark.nightly),
        pytest.param("gemma3_text", Checkpointing.full, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_compiled_layers_have_the_gradients_of_plain_ones(kind: str, mode: Checkpointing) -> None:
    made, plain = (adapted(num_hidden_layers=LAYERS, lora=ALL, kind=kind) for _ in range(2))
    compile_layers(made)
    if mode is Checkpointing.offloaded:
        offload_checkpoints(decoder_layers(made), torch.device("cpu"), True, within=True)
    else:
        checkpoint_layers(decoder_layers(made), True, within=True)
    for seed, width in enumerate((64, 32)):
        batch = padded([width, 20], width, seed=seed)
        loss, expected = loss_and_gradients(plain, batch)
        found, gradients = loss_and_gradients(made, batch)
        assert found == pytest.approx(loss, rel=1e-5)
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-5)


@compiles
@pytest.mark.usefixtures("traced")
@pytest.mark.nightly
def test_dropout_in_compiled_code_drops_the_same_again() -> None:
    made = adapted(num_hidden_layers=2, lora={**ALL, "lora_dropout": 0.5})
    compile_layers(made)
    checkpoint_layers(decoder_layers(made), True, within=True)
    whole = adapted(num_hidden_layers=2, lora={**ALL, "lora_dropout": 0.5})
    compile_layers(whole)
    torch.manual_seed(1)
    loss, expected = loss_and_gradients(whole, BATCH)
    torch.manual_seed(1)
    found, gradients = loss_and_gradients(made, BATCH)
    assert found == pytest.approx(loss, rel=1e-5)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-5)
