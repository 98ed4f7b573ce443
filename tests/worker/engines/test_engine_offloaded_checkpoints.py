"""Checkpoints in host memory: the same gradients, and only what is needed on the card. On a CPU the card is memory too;
what moves, and when, is the same code."""

import gc
import weakref
from typing import Any

import pytest
import torch
from engine_models import adapted, loss_and_gradients, padded
from torch import Tensor

from lora_lab.config import Checkpointing
from lora_lab.outcome import Unsupported
from lora_lab.worker import offloaded_checkpoints
from lora_lab.worker.engines.compiled import checkpointing_of, compile_layers, decoder_layers, is_compiled
from lora_lab.worker.offloaded_checkpoints import HostShelf, offload_checkpoints

CPU = torch.device("cpu")
BATCH = padded([64, 50], 64)


def offloaded(compiled: bool = False, **model: Any) -> Any:
    made = adapted(num_hidden_layers=4, **model)
    if compiled:
        compile_layers(made)
    offload_checkpoints(decoder_layers(made), CPU, keeps_random_state=True)
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_loss_and_gradients_are_those_without(kind: str) -> None:
    made = offloaded(kind=kind)
    assert checkpointing_of(made) is Checkpointing.offloaded
    for seed, width in enumerate((64, 32, 96)):
        batch = padded([width, 20], width, seed=seed)
        loss, expected = loss_and_gradients(adapted(num_hidden_layers=4, kind=kind), batch)
        found, gradients = loss_and_gradients(made, batch)
        assert found == loss
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_compiled_layers_are_still_compiled() -> None:
    made, plain = offloaded(compiled=True), adapted(num_hidden_layers=4)
    assert all(map(is_compiled, decoder_layers(made)))
    assert not any(map(is_compiled, decoder_layers(offloaded())))
    loss, expected = loss_and_gradients(plain, BATCH)
    found, gradients = loss_and_gradients(made, BATCH)
    assert found == pytest.approx(loss, rel=1e-5)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-5)


def test_dropout_drops_the_same_in_the_forward_and_when_it_is_done_again() -> None:
    made = offloaded(lora={"lora_dropout": 0.5})
    plain = adapted(num_hidden_layers=4, lora={"lora_dropout": 0.5})
    torch.manual_seed(1)
    loss, expected = loss_and_gradients(plain, BATCH)
    torch.manual_seed(1)
    found, gradients = loss_and_gradients(made, BATCH)
    assert found == loss
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_no_layers_input_but_the_last_ones_is_on_the_card_between_forward_and_backward() -> None:
    made = offloaded()
    given: list[Any] = []
    kept = HostShelf.put

    def watched(shelf: HostShelf, number: int, tensor: Tensor) -> Any:
        given.append(weakref.ref(tensor.untyped_storage()))
        return kept(shelf, number, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostShelf, "put", watched)
        loss = made(**BATCH).loss
    gc.collect()
    assert len(given) == 3, "of four layers"
    assert [storage() is not None for storage in given] == [False, False, True], "the last waits for the next to be put"
    loss.backward()
    gc.collect()
    assert not any(storage() for storage in given)


def test_evaluation_keeps_nothing() -> None:
    made = offloaded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostShelf, "put", lambda *_: pytest.fail("nothing is trained"))
        with torch.no_grad():
            made(**BATCH)
        made.eval()
        made(**BATCH)


def test_a_second_forward_before_the_backward_is_no_wrong_gradient() -> None:
    made = offloaded()
    first = made(**BATCH).loss
    made(**padded([64, 64], 64, seed=3)).loss.backward()
    with pytest.raises(RuntimeError, match="one forward before its backward"):
        first.backward()


def test_host_memory_that_cannot_be_had_says_what_to_type_instead() -> None:
    made, plenty = offloaded(), torch.empty

    def full(*shape: Any, **how: Any) -> Tensor:
        if "pin_memory" in how:
            raise RuntimeError("CUDA error: out of memory")
        return plenty(*shape, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloaded_checkpoints.torch, "empty", full)
        with pytest.raises(Unsupported, match=r"needs 0\.00 GiB of host memory.*gradient_checkpointing=full"):
            made(**BATCH)


def test_host_memory_is_that_of_the_longest_rows() -> None:
    shelf = HostShelf(2, CPU)
    for width in (8, 16, 4):
        tensor = torch.randn(2, width, 64)
        for number in (0, 1):
            put = shelf.put(number, tensor + number)
            assert torch.equal(shelf.take(number, put), tensor + number)
    assert shelf.host_bytes == 2 * 2 * 16 * 64 * 4
