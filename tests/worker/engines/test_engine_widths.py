"""The widths that rows are padded to, and that a step of every shape is made ready."""

import random

import torch
from engine_models import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import EngineConfig, TrialConfig
from lora_lab.method_config import OptimizerConfig
from lora_lab.options import Batching, EngineKind
from lora_lab.worker.data import IGNORED, Collator, Example, row_widths, train_collator
from lora_lab.worker.engines.engine import shapes, trainer_arguments

FIXED = st.sampled_from([EngineKind.compile, EngineKind.graph])
FREE = st.sampled_from([EngineKind.eager, EngineKind.liger])


def configured(kind: EngineKind, seq_len: int, lengths: int = 4, batching: Batching = Batching.longest) -> TrialConfig:
    config = TrialConfig(optimizer=OptimizerConfig(optim="adamw_torch"), seq_len=seq_len)
    config.engine = EngineConfig(kind=kind, lengths=lengths)
    config.data.batching = batching
    return config


def example(length: int) -> Example:
    ids = [VOCABULARY - 1] * length
    return Example(ids, [IGNORED, *ids[1:]])


@given(kind=FIXED, seq_len=st.integers(1, 9000), lengths=st.integers(1, 40))
def test_widths_ascend_to_seq_len_in_64s(kind: EngineKind, seq_len: int, lengths: int) -> None:
    widths = row_widths(configured(kind, seq_len, lengths))
    assert list(widths) == sorted(set(widths))
    assert widths[-1] == seq_len
    assert 1 <= len(widths) <= lengths
    assert all(width % 64 == 0 for width in widths[:-1])
    gaps = [b - a for a, b in zip((0, *widths), widths, strict=False)]
    assert max(gaps) <= seq_len / lengths + 64, "no row is padded by much more than its share"


@given(kind=FREE, seq_len=st.integers(1, 9000), lengths=st.integers(1, 9))
def test_without_compilation_a_batch_is_as_wide_as_its_longest_row(
    kind: EngineKind, seq_len: int, lengths: int
) -> None:
    config = configured(kind, seq_len, lengths)
    assert row_widths(config) == ()
    collator = train_collator(config, 0)
    length = 1 + seq_len // 3
    assert collator.width_of([example(length), example(1)]) == length
    assert shapes(config, [example(length)], collator) == []


@given(
    kind=st.sampled_from(list(EngineKind)),
    batching=st.sampled_from([Batching.seq_len, Batching.packed]),
    seq_len=st.integers(1, 9000),
)
def test_other_batchings_have_one_width(kind: EngineKind, batching: Batching, seq_len: int) -> None:
    config = configured(kind, seq_len, batching=batching)
    assert row_widths(config) == (seq_len,)
    assert train_collator(config, 0).width_of([example(1)]) == seq_len


@given(
    kind=FIXED,
    batching=st.sampled_from(list(Batching)),
    seq_len=st.integers(4, 700),
    lengths=st.integers(1, 9),
    rows=st.integers(1, 4),
    data=st.data(),
)
def test_every_batch_that_can_come_has_a_shape_that_was_made_ready(
    kind: EngineKind, batching: Batching, seq_len: int, lengths: int, rows: int, data: st.DataObject
) -> None:
    config = configured(kind, seq_len, lengths, batching)
    config.batch_size = rows
    sizes = data.draw(st.lists(st.integers(2, seq_len), min_size=1, max_size=12))
    examples = [example(size) for size in sizes]
    collator = train_collator(config, 0)
    made = shapes(config, examples, collator)
    ready = [{name: tuple(tensor.shape) for name, tensor in batch.items()} for batch in made]
    widths = [batch["input_ids"].shape[1] for batch in made]
    assert widths == sorted(set(widths), reverse=True), "longest first, each once"
    chance = random.Random(data.draw(st.integers(0, 10**6)))
    for _ in range(10):
        chosen = chance.choices(examples, k=rows)
        batch = collator(chosen)
        assert collator.width_of(chosen) >= max(len(one.ids) for one in chosen)
        assert {name: tuple(v.shape) for name, v in batch.items() if isinstance(v, torch.Tensor)} in ready
    for one in made:
        assert all(tensor.dtype is torch.long for tensor in one.values())
        assert bool(torch.any(one["labels"] != IGNORED))


@given(width=st.integers(1, 50), lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_a_row_wider_than_all_widths_is_not_cut(width: int, lengths: list[int]) -> None:
    collator = Collator(0, (width,))
    examples = [example(length) for length in lengths]
    assert collator.width_of(examples) == max(width, *lengths)


def test_only_liger_asks_transformers_for_kernels() -> None:
    for kind in EngineKind:
        config = configured(kind, 512)
        asked = trainer_arguments(config)
        assert asked.get("use_liger_kernel", False) is (kind is EngineKind.liger)
        assert ("accelerator_config" in asked) is (kind is EngineKind.graph)
    config.engine = EngineConfig(kind=EngineKind.liger, chunked_loss=True)
    kernels = trainer_arguments(config)["liger_kernel_config"]
    assert kernels == {"fused_linear_cross_entropy": True, "cross_entropy": False}
