"""One matrix that is embeddings and head: its gradient, in the memory of one."""

from typing import Any

import pytest
import torch
from engine_models import adapted, padded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.worker.engines import chunked_loss
from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.engines.tied_gradient import add_rows


@given(ids=st.lists(st.integers(0, 9), min_size=1, max_size=30), half=st.booleans(), seed=st.integers(0, 99))
def test_rows_are_added_up_by_id_and_rounded_once(ids: list[int], half: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if half else torch.float32
    whole = torch.randn(10, 3, generator=generator).to(dtype)
    rows = torch.randn(len(ids), 3, generator=generator).to(dtype)
    exact = whole.double().index_add_(0, torch.tensor(ids), rows.double())
    untouched = [word for word in range(10) if word not in ids]
    before = whole[untouched].clone()
    add_rows(whole, torch.tensor(ids), rows)
    torch.testing.assert_close(whole.double(), exact, rtol=2**-8 if half else 1e-5, atol=1e-5)
    assert torch.equal(whole[untouched], before)


def models(dtype: torch.dtype, **own: Any) -> list[Any]:
    """The plain model, and the same with its loss in chunks."""
    made = [adapted(tie_word_embeddings=True, **own).unload().requires_grad_(True).to(dtype) for _ in range(2)]
    use_chunked_loss(made[1])
    return made


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 50 * 300)


def apart(one: Any, other: Any) -> float:
    return max(
        float((a.grad.double() - b.grad.double()).norm() / b.grad.double().norm().clamp(min=1e-30))
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "autocast", "bound"),
    [(torch.float32, False, 1e-4), (torch.bfloat16, False, 0.02), (torch.float32, True, 0.02)],
)
@pytest.mark.parametrize("is_padding", [False, True])
def test_the_gradient_is_that_of_the_plain_model(
    dtype: torch.dtype, autocast: bool, bound: float, is_padding: bool
) -> None:
    """Rows of a padding token get nothing from the embeddings, wherever it stands: here it is a word of the text. Under
    autocast the head's gradient has another format, and both are added as ever."""
    plain, ours = models(dtype)
    batches = padded([40, 13, 64], 64), padded([9, 64], 64)  # the second one is added to the first
    word = int(batches[0]["input_ids"][0, 3])
    for model in (plain, ours):
        model.get_input_embeddings().padding_idx = word if is_padding else None
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
    assert apart(ours, plain) < bound
    row, whole = (each.get_input_embeddings().weight.grad[word].double() for each in (ours, plain))
    assert float((row - whole).norm() / whole.norm()) < bound


def test_two_losses_in_one_backward_and_one_that_was_given_up() -> None:
    plain, ours = models(torch.float32)
    first, second = padded([40, 13, 64], 64), padded([9, 64], 64)
    for model in (plain, ours):
        hidden = model.get_input_embeddings().weight
        given_up = model(**first).loss
        torch.autograd.grad(given_up, [next(model.model.layers[0].parameters())])  # the embeddings are not reached
        assert hidden.grad is None
        (model(**first).loss + 2 * model(**second).loss).backward()
    assert apart(ours, plain) < 1e-4


def test_no_second_gradient_of_its_size_is_made() -> None:
    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.shape == shape:
                places.add(found.untyped_storage().data_ptr())
            return found

    counts = []
    for model in models(torch.bfloat16):
        weight = model.get_input_embeddings().weight
        shape, places = weight.shape, {weight.untyped_storage().data_ptr()}
        with Made():
            model(**padded([40, 13], 64)).loss.backward()
        counts.append(len(places) - 1)
        assert weight.grad.untyped_storage().data_ptr() in places
    assert counts == [3, 1], "of the plain model: the head's, the embeddings', and their sum"


def test_embeddings_that_do_more_are_left_alone() -> None:
    own = {"sliding_window": 64, "query_pre_attn_scalar": 16}
    plain, ours = (adapted("gemma3_text", tie_word_embeddings=True, **own).unload().requires_grad_(True) for _ in "12")
    use_chunked_loss(ours)
    assert "forward" not in ours.get_input_embeddings().__dict__
    for model in (plain, ours):
        model(**padded([40, 13], 64)).loss.backward()
    assert apart(ours, plain) < 1e-4
