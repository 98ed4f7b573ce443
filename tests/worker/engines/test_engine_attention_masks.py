"""Masks that depend on a batch's shape alone leave every result as it was."""

from typing import Any

import pytest
import torch
from engine_models import adapted, adapters, furthest, loss_and_gradients, padded
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.integrations import sdpa_attention

from lora_lab.worker.data import IGNORED, Collator, Example
from lora_lab.worker.engines import attention_masks
from lora_lab.worker.engines.attention_masks import always_mask, attention_of, leave_out_masks, needs_no_mask

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

KINDS = ["qwen2", "llama", "mistral", "qwen3", "phi3", "granite"]
TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


class Given:
    """The masks that torch's attention is called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: list[Tensor | None] = []
        own: Any = torch.nn.functional.scaled_dot_product_attention

        def attention(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            self.masks.append(attn_mask)
            result: Tensor = own(*args, attn_mask=attn_mask, **kwargs)
            return result

        monkeypatch.setattr(sdpa_attention.torch.nn.functional, "scaled_dot_product_attention", attention)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[40, 64, 11], [3]], ids=str)
def test_padded_rows_need_no_mask(kind: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, without = adapted(kind), adapted(kind)
    assert needs_no_mask(without.config.get_text_config(), 64)
    leave_out_masks(without)
    batch = padded(lengths, 64)
    loss, gradients = loss_and_gradients(plain, batch)
    given = Given(monkeypatch)
    found, slopes = loss_and_gradients(without, batch)
    assert given.masks == [None, None], "one for each layer"
    assert found == pytest.approx(loss, rel=1e-5)
    assert furthest(slopes, gradients) < 1e-4


def packed_batch(rows: list[list[int]], width: int) -> dict[str, Tensor]:
    """Rows of documents of these lengths."""
    generator = torch.Generator().manual_seed(sum(map(sum, rows)))
    made = []
    for lengths in rows:
        ids = torch.randint(3, 270, (sum(lengths),), generator=generator).tolist()
        starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        made.append(Example(ids, [IGNORED if i in starts else token for i, token in enumerate(ids)], starts=starts))
    batch = Collator(0, (width,), packed=True)(made)
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


PACKED = {
    "several documents": [[20, 30, 14], [40, 20]],
    "one document, padded": [[50], [61]],
    "one document that fills the row": [[64], [64]],
    "full, and several": [[64], [10, 54]],
    "a single row": [[64]],
    "a single row, several": [[30, 20]],
}


@pytest.mark.parametrize("name", list(PACKED))
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_packed_rows_with_a_mask_in_every_batch(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, masked = adapted(kind), adapted(kind)
    always_mask(masked)
    batch = packed_batch(PACKED[name], 64)
    loss, gradients = loss_and_gradients(plain, batch)
    given = Given(monkeypatch)
    found, slopes = loss_and_gradients(masked, batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert furthest(slopes, gradients) < 1e-4
    rows = len(PACKED[name])
    for mask in given.masks:
        assert mask is not None
        assert (mask.shape, mask.stride()) == ((rows, 1, 64, 64), (64 * 64, 64 * 64, 64, 1))


def test_packed_documents_are_trained_as_if_each_stood_alone() -> None:
    model = adapted()
    always_mask(model)
    batch = packed_batch([[20, 30, 14]], 64)
    whole, _ = loss_and_gradients(model, batch)
    nats, count, start = 0.0, 0, 0
    for length in (20, 30, 14):
        ids = batch["input_ids"][:, start : start + length]
        alone, _ = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
        nats, count, start = nats + alone * (length - 1), count + length - 1, start + length
    assert whole == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("lengths", [[40, 64, 11], [64, 64, 64]], ids=str)
@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_layers_with_a_window_shorter_than_the_rows(
    kind: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"sliding_window": 16}
    if kind == "qwen2":
        own |= {"use_sliding_window": True, "max_window_layers": 1}
    plain, masked = adapted(kind, **own), adapted(kind, **own)
    assert not needs_no_mask(masked.config.get_text_config(), 64)
    always_mask(masked)
    batch = padded(lengths, 64)
    loss, gradients = loss_and_gradients(plain, batch)
    given = Given(monkeypatch)
    found, slopes = loss_and_gradients(masked, batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert furthest(slopes, gradients) < 1e-4
    assert len({(mask.shape, mask.stride()) for mask in given.masks if mask is not None}) == 1
    assert None not in given.masks


NEEDS: list[tuple[str, dict[str, Any], int, bool]] = [
    ("llama", {}, 4096, True),
    ("qwen2", {}, 32768, True),
    ("qwen2", {"sliding_window": 128}, 4096, True),  # not used unless asked for
    ("qwen2", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 2}, 512, False),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2}, 512, True),
    ("qwen3", {}, 4096, True),
    ("mistral", {}, 4096, True),
    ("mistral", {"sliding_window": 512}, 512, True),
    ("mistral", {"sliding_window": 511}, 512, False),
    ("mistral", {"sliding_window": None}, 512, True),
    ("gemma2", {"sliding_window": 128}, 512, False),
    ("gemma3_text", {"sliding_window": 128}, 512, False),
    ("gemma3_text", {"sliding_window": 1024}, 512, True),
    ("llama4_text", {"attention_chunk_size": 64}, 512, False),
    ("qwen3_next", {}, 512, False),
]


@pytest.mark.parametrize(("kind", "own", "seq_len", "needless"), NEEDS)
def test_which_models_need_no_mask(kind: str, own: dict[str, Any], seq_len: int, needless: bool) -> None:
    config = CONFIG_MAPPING[kind](**TINY, **own)
    assert needs_no_mask(config.get_text_config(), seq_len) is needless


def test_what_is_read_back() -> None:
    model, other = adapted(), adapted()
    assert attention_of(model) == ("sdpa", "as needed")
    leave_out_masks(model)
    assert attention_of(model) == ("sdpa", "never")
    always_mask(other)
    assert attention_of(other) == ("sdpa", "always")
    assert attention_of(model) == ("sdpa", "never")
    assert attention_of(adapted(attention="eager")) == ("eager", "as needed")


@pytest.mark.parametrize("settle", [leave_out_masks, always_mask])
def test_a_batch_without_any_mask_is_causal_still(settle: Any) -> None:
    model = adapted()
    settle(model)
    ids = padded([64], 64)["input_ids"]
    with torch.no_grad():
        whole = model.eval()(input_ids=ids).logits[:, :20]
        part = model(input_ids=ids[:, :20]).logits
    torch.testing.assert_close(whole, part, rtol=1e-4, atol=1e-4)


def test_no_mask_reads_what_is_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for the device, which no CUDA graph can record: nothing may become a Python bool."""
    for settle, batch in (
        (leave_out_masks, padded([40, 64], 64)),
        (always_mask, packed_batch([[40], [64]], 64)),
    ):
        model = adapted()
        settle(model)
        assert adapters(model)
        reads: list[int] = []
        own = Tensor.__bool__

        def read(tensor: Tensor, own: Any = own, reads: list[int] = reads) -> bool:
            reads.append(1)
            return bool(own(tensor))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "__bool__", read)
            model(**batch)
        if settle is leave_out_masks:
            assert reads == []
        assert attention_masks.attention_of(model)[0] == "sdpa"
