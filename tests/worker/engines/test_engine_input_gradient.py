"""The first layer's input needs a gradient, and is not kept for that."""

import gc
import weakref
from typing import Any

import pytest
import torch
from engine_models import adapted, loss_and_gradients, padded

from lora_lab.worker.engines.input_gradient import require_input_gradient
from lora_lab.worker.trainables.trainable import base_of

BATCH = padded([40, 64], 64)


def embeddings(model: Any) -> Any:
    return base_of(model).get_input_embeddings()


@pytest.mark.parametrize(
    "own",
    [{}, {"kind": "gemma3_text"}, {"lora": {"target_modules": ["q_proj", "embed_tokens"]}}],
    ids=["llama", "scaled", "adapted embeddings"],
)
def test_losses_and_gradients_stay(own: dict[str, Any]) -> None:
    plain, other = adapted(**own), adapted(**own)
    require_input_gradient(other)
    (loss, gradients), (same, others) = (loss_and_gradients(model, BATCH) for model in (plain, other))
    assert loss == same
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_it_is_needed_only_where_gradients_are() -> None:
    model = adapted()
    require_input_gradient(model)
    assert embeddings(model)(BATCH["input_ids"]).requires_grad
    with torch.no_grad():
        assert not embeddings(model)(BATCH["input_ids"]).requires_grad


def test_what_the_embeddings_give_is_not_kept_until_the_backward() -> None:
    model = adapted()
    require_input_gradient(model)
    output = embeddings(model)(BATCH["input_ids"])
    storage = weakref.ref(output.untyped_storage())
    result = 2 * output  # whose backward does not need it
    del output
    gc.collect()
    assert result.requires_grad
    assert storage() is None
