"""From rows to batches: every token counted, none lost, no document sees another."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_lab.composition.compose import CONF
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.dataset.row import Conversation
from lora_lab.method_config import OptimizerConfig, PrecisionConfig
from lora_lab.options import Attention, Batching, DataSource, DType, ModelSource, Weights
from lora_lab.worker.data import IGNORED, Example, TokenCounts, pack, train_collator
from lora_lab.worker.loading import load_examples
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer
from lora_lab.worker.tokenising import tokenize
from tests.helpers.chat_templates import GEMMA, tokenizer_of

# peft 0.21 still asks transformers 5.23 by the older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PAD = 258
SEQ_LEN = 24
TOKENIZER: Any = tiny_tokenizer()
END = "<|im_end|>"


def trial(batching: Batching = Batching.longest, seq_len: int = SEQ_LEN) -> TrialConfig:
    config = TrialConfig(
        optimizer=OptimizerConfig(optim="adamw_torch"), precision=PrecisionConfig(dtype=DType.fp32), seq_len=seq_len
    )
    config.data.batching = batching
    config.model.source, config.model.weights = ModelSource.tiny, Weights.random
    config.model.architecture = yaml.safe_load((CONF / "model/tiny.yaml").read_text())["architecture"]
    return config


@st.composite
def example(draw: st.DrawFn, longest: int = SEQ_LEN) -> Example:
    ids = draw(st.lists(st.integers(0, PAD - 1), min_size=1, max_size=longest))
    trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    labels = [token if predicted else IGNORED for token, predicted in zip(ids, trained, strict=True)]
    return Example(ids, labels, truncated=draw(st.booleans()))


EXAMPLES = st.lists(example(), min_size=1, max_size=12)


def documents(row: Example) -> Iterator[tuple[list[int], list[int]]]:
    """What `pack` laid into a row, as (ids, labels)."""
    for start, end in pairwise([*row.starts, len(row.ids)]):
        yield row.ids[start:end], row.labels[start:end]


def collated(config: TrialConfig, examples: list[Example]) -> tuple[dict[str, Tensor], TokenCounts]:
    batch = train_collator(config, PAD)(examples)
    counts = batch.pop("counts")
    assert isinstance(counts, TokenCounts)
    tensors = {name: tensor for name, tensor in batch.items() if isinstance(tensor, Tensor)}
    assert len(tensors) == len(batch)
    return tensors, counts


@pytest.mark.parametrize("batching", Batching)
@given(examples=EXAMPLES)
def test_counts_are_what_the_batch_holds(batching: Batching, examples: list[Example]) -> None:
    if batching is Batching.packed:
        examples = pack(examples, SEQ_LEN)
    batch, counts = collated(trial(batching), examples)
    ids, labels = batch["input_ids"], batch["labels"]
    shifted = labels[:, 1:]  # as a causal model's loss sees them
    assert counts.rows == len(ids)
    assert counts.slots == ids.numel() == labels.numel()
    assert counts.real == int((ids != PAD).sum())
    assert counts.trained == int((shifted != IGNORED).sum())
    assert torch.equal(shifted[shifted != IGNORED], ids[:, 1:][shifted != IGNORED]), "labels are the ids themselves"
    assert bool((labels[ids == PAD] == IGNORED).all()), "padding is never predicted"
    for row, whole in zip(ids.tolist(), examples, strict=True):
        assert row == whole.ids + [PAD] * (ids.shape[1] - len(whole.ids))


@given(examples=EXAMPLES)
def test_the_width_is_what_batching_says(examples: list[Example]) -> None:
    longest, _ = collated(trial(Batching.longest), examples)
    fixed, _ = collated(trial(Batching.seq_len), examples)
    assert longest["input_ids"].shape[1] == max(len(example.ids) for example in examples)
    assert fixed["input_ids"].shape[1] == SEQ_LEN
    for batch in (longest, fixed):
        assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD).long())
        assert "position_ids" not in batch


@given(examples=EXAMPLES)
def test_packing_loses_no_token_and_makes_none(examples: list[Example]) -> None:
    rows = pack(examples, SEQ_LEN)
    packed = sorted(document for row in rows for document in documents(row))
    assert packed == sorted((one.ids, [IGNORED, *one.labels[1:]]) for one in examples)
    assert sum(row.trained for row in rows) == sum(one.trained for one in examples)
    for row in rows:
        assert len(row.ids) == len(row.labels) <= SEQ_LEN
        assert all(row.labels[start] == IGNORED for start in row.starts), "predicted from the document before"
        assert row.starts[0] == 0
        assert list(row.starts) == sorted(set(row.starts))
    assert any(row.truncated for row in rows) == any(one.truncated for one in examples)


@given(examples=EXAMPLES)
def test_packing_leaves_no_row_that_another_had_room_for(examples: list[Example]) -> None:
    rows = pack(examples, SEQ_LEN)
    for number, row in enumerate(rows):
        smallest = min(len(ids) for ids, _ in documents(row))
        assert all(len(before.ids) + smallest > SEQ_LEN for before in rows[:number])


@given(examples=EXAMPLES)
def test_positions_begin_again_with_every_document(examples: list[Example]) -> None:
    rows = pack(examples, SEQ_LEN)
    batch, _ = collated(trial(Batching.packed), rows)
    assert "attention_mask" not in batch, "with a mask transformers would not look at the positions"
    assert batch["position_ids"].shape == batch["input_ids"].shape
    for row, positions in zip(rows, batch["position_ids"].tolist(), strict=True):
        padding = SEQ_LEN - len(row.ids)
        lengths = [len(ids) for ids, _ in documents(row)] + ([padding] if padding else [])
        assert positions == [i for length in lengths for i in range(length)]


def packing_trial(attention: Attention) -> TrialConfig:
    config = trial(Batching.packed, seq_len=96)
    config.attention = attention
    return config


@pytest.mark.parametrize("attention", [Attention.sdpa, Attention.eager])
@pytest.mark.parametrize("rows_in_a_batch", [1, 3])
def test_documents_in_a_packed_row_never_see_each_other(attention: Attention, rows_in_a_batch: int) -> None:
    """The logits of each are those it has alone, in the model as it is trained."""
    torch.manual_seed(0)
    config = packing_trial(attention)
    cpu = torch.device("cpu")
    model = load_model(config, load_architecture(config.model), cpu).train()
    generator = torch.Generator().manual_seed(1)
    lengths = [40, 7, 30, 19, 64, 20, 11, 96, 1, 50, 33]
    made = [torch.randint(PAD, (length,), generator=generator).tolist() for length in lengths]
    rows = pack([Example(ids, ids) for ids in made], config.seq_len)
    assert max(len(row.starts) for row in rows) >= 3
    assert any(len(row.ids) < config.seq_len for row in rows), "padding is a document too"

    blind = 0.0
    for first in range(0, len(rows), rows_in_a_batch):
        chosen = rows[first : first + rows_in_a_batch]
        batch, counts = collated(config, chosen)
        with torch.no_grad():
            output = model(**batch)
            joined = model(input_ids=batch["input_ids"]).logits
        nats = 0.0
        for row, logits, seeing in zip(chosen, output.logits, joined, strict=True):
            for start, end in pairwise([*row.starts, len(row.ids)]):
                ids = torch.tensor([row.ids[start:end]])
                with torch.no_grad():
                    alone = model(input_ids=ids).logits[0]
                torch.testing.assert_close(logits[start:end], alone, atol=1e-4, rtol=0)
                blind = max(blind, float((seeing[start:end] - alone).abs().max()))
                nats += float(torch.nn.functional.cross_entropy(alone[:-1], ids[0, 1:], reduction="sum"))
        if counts.trained:
            assert float(output.loss) == pytest.approx(nats / counts.trained, rel=1e-5)
    assert blind > 1e-2, "this model would not show it if documents did see each other"


TEXT = st.text(min_size=1, max_size=40).map(str.strip).filter(bool)


@given(text=st.text(max_size=60))
def test_any_text_runs_through_the_tiny_tokenizer_unchanged(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < 259 for token in ids)
    if "<|" not in text:  # or it may hold a special token's name
        assert len(ids) == len(text.encode())


def test_the_tiny_tokenizers_special_tokens_are_one_token_each_and_fit_the_tiny_model() -> None:
    special = ["<|im_start|>", END, "<|pad|>"]
    assert [len(TOKENIZER(token)["input_ids"]) for token in special] == [1, 1, 1]
    assert len(TOKENIZER) == 259 <= (trial().model.architecture or {})["vocab_size"]
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id, "the end of a turn must not be taken for padding"


@given(prompt=TEXT, response=TEXT)
def test_exactly_the_response_and_its_end_are_trained(prompt: str, response: str) -> None:
    made = tokenize(Conversation.of(prompt, response), TOKENIZER, seq_len=10_000)
    predicted = [label for label in made.labels if label != IGNORED]
    assert TOKENIZER.decode(predicted) == response + END
    assert made.labels[-len(predicted) :] == predicted == made.ids[-len(predicted) :]
    assert made.trained == len(predicted)
    assert not made.truncated
    turn = [{"role": "user", "content": prompt}]
    asked = TOKENIZER.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.decode(made.ids) == asked + response + END, "the prompt is what the model is asked with"


@given(prompt=TEXT, response=TEXT, seq_len=st.integers(1, 150))
def test_a_row_is_cut_at_its_end_and_says_so(prompt: str, response: str, seq_len: int) -> None:
    whole = tokenize(Conversation.of(prompt, response), TOKENIZER, seq_len=10_000)
    cut = tokenize(Conversation.of(prompt, response), TOKENIZER, seq_len)
    assert cut.ids == whole.ids[:seq_len]
    assert cut.labels == whole.labels[:seq_len]
    assert cut.truncated == (len(whole.ids) > seq_len)
    prompt_tokens = len(whole.ids) - whole.trained
    assert cut.trained == max(0, min(seq_len, len(whole.ids)) - prompt_tokens)


def test_a_template_that_does_not_continue_its_prompt_is_refused() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}{% if add_generation_prompt %} ->{% endif %}"
    with pytest.raises(InvalidInput, match="chat template"):
        tokenize(Conversation.of("Why?", "Because."), tokenizer, 100)


@pytest.mark.parametrize("row", [{"text": "Once."}, {"prompt": "2 + 2 =", "completion": " 4"}])
def test_a_base_model_without_a_template_takes_passages_only(tmp_path: Path, row: dict[str, str]) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = None
    config = jsonl(tmp_path, [(5, n) for n in range(1, 21)])
    with pytest.raises(InvalidInput, match=r"no chat template.*data=completion"):
        load_examples(config, tokenizer, 272)
    rows = [{name: f"{number} {text}" for name, text in row.items()} for number in range(20)]
    Path(str(config.data.path)).write_text("\n".join(map(json.dumps, rows)))
    made = load_examples(config, tokenizer, 272)
    assert (made.rows_read, made.rows_lost, made.end_of_turn) == (20, 0, END)
    assert made.rows_heldout_prompt_trained == 0, "texts have no prompt that could be in both splits"
    assert all(tokenizer.decode(each.ids).endswith(END) for each in (*made.train, *made.heldout))


def test_a_system_prompt_that_has_no_place_is_said_to_be_moved(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Why?"), ("assistant", "So.")]
    rows = [{"messages": [{"role": role, "content": f"{text} {n}"} for role, text in turns]} for n in range(20)]
    config = jsonl(tmp_path, [])
    Path(str(config.data.path)).write_text("\n".join(map(json.dumps, rows)))
    made = load_examples(config, tokenizer_of(GEMMA), 10_000)
    assert made.rows_lost == 0
    assert any("no system prompt: in 20 of 20 rows" in remark for remark in made.remarks)


def jsonl(folder: Path, lengths: list[tuple[int, int]]) -> TrialConfig:
    path = folder / "rows.jsonl"
    rows = [
        {"instruction": chr(97 + i % 26) * prompt, "output": chr(97 + i % 26) * response}
        for i, (prompt, response) in enumerate(lengths)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    config = trial(seq_len=100)
    config.data.source, config.data.path = DataSource.jsonl, str(path)
    return config


@pytest.mark.parametrize("batching", Batching)
def test_every_row_read_is_accounted_for(tmp_path: Path, batching: Batching) -> None:
    config = jsonl(tmp_path, [(10, 20)] * 20 + [(10, 200)] * 5 + [(200, 10)] * 3)
    config.data.batching = batching
    made = load_examples(config, TOKENIZER, 272)
    assert made.rows_read == 28
    assert made.rows_truncated == 8
    assert made.rows_without_labels == 3
    assert sum(len(row.starts) for row in made.train) + len(made.heldout) == 25
    assert len(made.heldout) == 2
    assert all(example.trained for example in [*made.train, *made.heldout])
    assert all(len(example.ids) <= 100 for example in [*made.train, *made.heldout])


def test_held_out_rows_do_not_move_with_seed_batch_size_or_batching(tmp_path: Path) -> None:
    first = jsonl(tmp_path, [(5, n) for n in range(1, 41)])
    other = jsonl(tmp_path, [(5, n) for n in range(1, 41)])
    other.seed, other.batch_size, other.grad_accum_steps, other.data.batching = 99, 3, 4, Batching.packed
    one, two = (load_examples(config, TOKENIZER, 272) for config in (first, other))
    assert [*one.heldout] == [*two.heldout]
    trained_on = {tuple(ids) for row in two.train for ids, _ in documents(row)}
    assert not trained_on & {tuple(example.ids) for example in two.heldout}


def test_rows_that_come_twice_are_not_held_out_and_trained_on(tmp_path: Path) -> None:
    config = jsonl(tmp_path, [(5, n) for n in range(1, 21)] * 26)  # letter and lengths come again after 260 rows
    config.data.batching = Batching.packed
    made = load_examples(config, TOKENIZER, 272)
    trained_on = {tuple(ids) for row in made.train for ids, _ in documents(row)}
    assert made.heldout
    assert not trained_on & {tuple(example.ids) for example in made.heldout}
    assert (made.rows_read, made.rows_repeated, made.rows_heldout_prompt_trained > 0) == (520, 260, True)


def test_the_digest_tells_data_apart(tmp_path: Path) -> None:
    def digest(config: TrialConfig) -> str:
        return load_examples(config, TOKENIZER, 272).digest

    lengths = [(5, n) for n in range(1, 41)]
    assert digest(jsonl(tmp_path, lengths)) == digest(jsonl(tmp_path, lengths))
    assert digest(jsonl(tmp_path, lengths)) != digest(jsonl(tmp_path, lengths[::-1]))
    shorter = jsonl(tmp_path, lengths)
    shorter.seq_len = 60
    assert digest(jsonl(tmp_path, lengths)) != digest(shorter)


def test_no_row_with_a_token_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="Raise seq_len"):
        load_examples(jsonl(tmp_path, [(200, 5)] * 5), TOKENIZER, 272)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    accumulate=st.integers(1, 4),
    batching=st.sampled_from(Batching),
)
def test_a_step_can_be_filled_or_the_data_is_refused(
    rows: int, batch_size: int, accumulate: int, batching: Batching
) -> None:
    config = trial(batching)
    config.data.source, config.data.rows = DataSource.random_tokens, rows
    config.batch_size, config.grad_accum_steps = batch_size, accumulate
    if rows - max(1, round(rows / 10)) < batch_size * accumulate:
        with pytest.raises(InvalidInput, match="batch_size"):
            load_examples(config, TOKENIZER, 272)
    else:
        made = load_examples(config, TOKENIZER, 272)
        assert len(made.train) >= batch_size * accumulate
        assert made.heldout


@given(rows=st.integers(2, 20), seq_len=st.integers(2, 40), seed=st.integers(0, 5))
def test_random_tokens_fill_every_slot_and_follow_the_seed(rows: int, seq_len: int, seed: int) -> None:
    def made(with_seed: int) -> list[Example]:
        config = trial(Batching.packed, seq_len)
        config.data.source, config.data.rows, config.seed = DataSource.random_tokens, rows, with_seed
        config.batch_size = 1
        return [*load_examples(config, TOKENIZER, 272).train]

    first = made(seed)
    assert first == made(seed)
    assume(rows * seq_len > 20)
    assert first != made(seed + 1)
    assert {len(example.ids) for example in first} == {seq_len}
    assert {example.trained for example in first} == {seq_len - 1}
    assert all(0 <= token < 272 for example in first for token in example.ids)
