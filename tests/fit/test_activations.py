"""What the worker really does, seen on the CPU, against what the tape says: what a forward keeps, and the loss."""

from typing import Any

import pytest
import torch

from lora_lab.config import MethodConfig, ModelConfig, PrecisionConfig, TrialConfig
from lora_lab.data_config import DataConfig
from lora_lab.fit.estimate import tape_of
from lora_lab.fit.loss import CHUNK_ELEMENTS, chunk_rows
from lora_lab.fit.shapes import shapes_of
from lora_lab.fit.step import LOSS
from lora_lab.options import DataSource, DType, Quantization, Weights
from lora_lab.worker.engines import chunked_loss
from lora_lab.worker.models import load_architecture, load_model

ROWS, LENGTH = 2, 128
SHAPES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def trial(family: str, method: MethodConfig, dtype: DType, **more: Any) -> TrialConfig:
    return TrialConfig(
        model=ModelConfig(weights=Weights.random, architecture={"model_type": family, **SHAPES, **more}),
        method=method,
        precision=PrecisionConfig(dtype=dtype),
        data=DataConfig(source=DataSource.random_tokens),
        batch_size=ROWS,
        seq_len=LENGTH,
    )


def kept_bytes(config: TrialConfig) -> int:
    """Bytes of what the decoder's forward keeps, each storage once, without weights."""
    model = load_model(config, load_architecture(config.model), torch.device("cpu")).train()
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(3, 500, (ROWS, LENGTH))
    half = config.precision.dtype is not DType.fp32
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        _output = model.get_base_model().model(input_ids=ids).last_hidden_state  # alive, so that all it needs is too
        return sum(storage.nbytes() for storage in kept.values())


def said_bytes(config: TrialConfig) -> int:
    """What the tape holds for a step when its loss begins, without the decoder's output."""
    tape, _ = tape_of(config, shapes_of(config.model))
    held = last = 0
    for number, size in tape.events[tape.loaded :]:
        if tape.parts[number] == LOSS:
            return held - last
        held += size
        last = size if size > 0 else last
    raise AssertionError("the tape has no loss")


def test_chunks_of_the_loss_are_those_of_the_engine() -> None:
    assert chunked_loss.CHUNK_ELEMENTS == CHUNK_ELEMENTS
    for rows, vocabulary, hidden in ((512, 151936, 1536), (16384, 151936, 1536), (8192, 128256, 4096), (100, 272, 0)):
        assert chunk_rows(rows, vocabulary, hidden) == chunked_loss.chunk_rows(rows, vocabulary, hidden)


LORA = MethodConfig(quantization=Quantization.none, rank=16)


@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", {}), ("qwen3", {"head_dim": 128}), ("phi3", {}), ("gemma3_text", {"head_dim": 128})],
)
def test_what_a_forward_keeps_is_on_the_tape(family: str, more: dict[str, Any]) -> None:
    config = trial(family, LORA, DType.bf16, **more)
    assert said_bytes(config) == pytest.approx(kept_bytes(config), rel=0.015)


def test_in_fp32_norms_keep_the_stream_itself() -> None:
    config = trial("llama", LORA, DType.fp32)
    assert said_bytes(config) == pytest.approx(kept_bytes(config), rel=0.015)


def test_a_raised_stream_costs_wider_activations() -> None:
    """On a CPU PEFT converts the inputs of 4-bit layers as it does those of others; with a raised stream on both."""
    nf4 = MethodConfig(quantization=Quantization.nf4, double_quantization=True, rank=16, raise_to_fp32=True)
    config = trial("llama", nf4, DType.bf16)
    assert said_bytes(config) == pytest.approx(kept_bytes(config), rel=0.03)
