"""What of a row the model reads and what is trained, over tokenizers and chat templates of many kinds."""

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.dataset.row import Conversation, Role, Turn
from lora_lab.dataset.shipped import SHIPPED
from lora_lab.options import DataSource
from lora_lab.worker.conversation import Conversations
from lora_lab.worker.data import IGNORED
from lora_lab.worker.examples import check_token_ids, pad_id
from lora_lab.worker.laid_out import Losses, Lost
from lora_lab.worker.loading import load_examples
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer
from lora_lab.worker.tokenising import tokenize

TEXTS = [json.loads(line)["output"] for line in SHIPPED.read_text().splitlines()[:80]]
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|eot|>"]


def byte_level(template: str, **tokens: str | None) -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    named = {"eos_token": "<|end|>", "pad_token": "<|pad|>", **tokens}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **{k: v for k, v in named.items() if v})
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(template: str) -> Any:
    """transformers' own class for Llama's tokenizer, with a vocabulary made here."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    inner = json.loads(made.to_str())["model"]
    merges = [tuple(merge) for merge in inner["merges"]]
    tokenizer = transformers.LlamaTokenizer(vocab=inner["vocab"], merges=merges, legacy=False)
    tokenizer.chat_template = template
    return tokenizer


def words_only(template: str) -> Any:
    """Knows the words of its training and nothing else, as a tokenizer without bytes to fall back on."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(["why is it so because"], trainers.WordLevelTrainer(special_tokens=["<unk>", *SPECIAL]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def template(
    question: str = "{{ m.content }}", answer: str = "{{ m.content }}", end: str = "<|end|>", ask: str = ""
) -> str:
    return (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>"
        + question
        + "{% else %}<|assistant|>"
        + answer
        + end
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        + ask
        + "{% endif %}"
    )


PLAIN = template()
PARTS = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
NO_THOUGHTS = "{{ m.content.split('</think>')[-1] }}"
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ROW = Conversation.of("Why is the sky blue?", "Because of the air. It is so!")


def trained(tokenizer: Any, row: Conversation = ROW) -> str:
    return str(tokenizer.decode([label for label in tokenize(row, tokenizer, 10_000).labels if label != IGNORED]))


def read(tokenizer: Any, row: Conversation = ROW) -> str:
    made = tokenize(row, tokenizer, 10_000)
    return str(tokenizer.decode(made.ids[: len(made.ids) - sum(label != IGNORED for label in made.labels)]))


TOKENIZERS = [
    (byte_level(PLAIN), "<|end|>"),
    (byte_level(template(PARTS, PARTS)), "<|end|>"),
    (byte_level(template(end="<|end|>\n<|eot|>")), "<|end|>"),  # nothing after the end of the turn
    (byte_level(template(end="<|eot|>\n")), "<|eot|>"),  # an end of turn that is not the end of text
    (byte_level(template(end="")), "<|end|>"),  # no end of turn: the end of text is added
    (byte_level(template(end="\n### Stop\n")), "\n### Stop"),  # an end in plain text
    (byte_level(template(ask="<think>\n")), "<|end|>"),
    (sentencepiece(ZEPHYR), "</s>"),
    (sentencepiece(LLAMA_2), "</s>"),
]
NAMES = ["plain", "parts", "two ends", "another end", "no end", "text end", "opened", "zephyr", "llama 2"]


@pytest.mark.parametrize(("tokenizer", "end"), TOKENIZERS, ids=NAMES)
@settings(max_examples=25)
@given(answer=st.text("abc .,!?éß漢字\n-'\"", min_size=1, max_size=30).map(str.strip).filter(bool))
def test_the_answer_and_one_end_are_trained_whatever_the_template(tokenizer: Any, end: str, answer: str) -> None:
    conversations = Conversations(tokenizer)
    row = Conversation.of("Why is the sky blue?", answer)
    turn = conversations.lay_out(row)
    said = tokenizer.decode(turn.trained)
    assert said.replace(" ", "") == (answer + end).replace(" ", "")
    assert "Why is the sky blue?" in tokenizer.decode(turn.read)
    assert not turn.lost
    assert conversations.end_of_turn == end.strip()


@pytest.mark.parametrize(("tokenizer", "end"), TOKENIZERS, ids=NAMES)
def test_every_answer_of_a_longer_conversation_has_its_end(tokenizer: Any, end: str) -> None:
    said = [("Why is it so?", "So."), ("So?", "So it is."), ("Why?", "So.")]
    turns = tuple(turn for pair in said for turn in map(Turn, (Role.user, Role.assistant), pair))
    laid = Conversations(tokenizer).lay_out(Conversation(turns))
    assert not laid.lost
    spans = [tokenizer.decode(laid.ids[start:stop]).replace(" ", "") for start, stop in laid.spans]
    assert spans == [(answer + end).replace(" ", "") for _, answer in said]
    assert laid.spans[-1][1] == len(laid.ids)


@pytest.mark.parametrize("layout", [ZEPHYR, LLAMA_2, PLAIN, template(end="")])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("answer", ["Hello there", "-1", "(yes)", "é", "\u2581"])
def test_ids_are_those_of_the_whole_conversation(make: Any, layout: str, answer: str) -> None:
    """A SentencePiece tokenizer puts a space before a text of its own: the answer must not get one."""
    tokenizer = make(layout) if make is sentencepiece else byte_level(layout, bos_token="<|user|>")
    turn = [{"role": "user", "content": ROW.turns[0].text}, {"role": "assistant", "content": answer}]
    whole = tokenizer(tokenizer.apply_chat_template(turn, tokenize=False), add_special_tokens=False)["input_ids"]
    made = tokenize(Conversation.of(ROW.turns[0].text, answer), tokenizer, 10_000)
    kept = made.ids if tokenizer.decode(whole) != tokenizer.decode(made.ids[:-1]) else made.ids[:-1]
    assert whole[: len(kept)] == kept


def test_a_token_that_spans_the_edge_is_cut_there_and_counted() -> None:
    tokenizer = byte_level(
        "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}<|end|>{% endif %}{% endfor %}"
    )
    whole = "the answer"
    spanning = next(
        i
        for i in range(1, len(whole))
        if len(tokenizer(whole[:i] + whole[i:])["input_ids"])
        < len(tokenizer(whole[:i])["input_ids"] + tokenizer(whole[i:])["input_ids"])
    )
    turn = Conversations(tokenizer).lay_out(Conversation.of(whole[:spanning], whole[spanning:]))
    assert turn.apart
    assert tokenizer.decode(turn.read) == whole[:spanning]
    assert tokenizer.decode(turn.trained) == whole[spanning:] + "<|end|>"


def test_an_answer_that_opens_as_the_prompt_does_goes_on_from_there() -> None:
    tokenizer = byte_level(template(answer=NO_THOUGHTS, ask="<think>\n"))
    row = Conversation.of("Why?", "<think>\nhm\n</think>\n\nSo.")
    assert trained(tokenizer, row) == "hm\n</think>\n\nSo.<|end|>"
    assert read(tokenizer, row).endswith("<|assistant|><think>\n")
    assert not Conversations(tokenizer).lay_out(row).lost


@pytest.mark.parametrize(
    ("tokenizer", "row", "lost"),
    [
        (byte_level(template(answer=NO_THOUGHTS)), Conversation.of("Why?", "<think>hm</think>So."), Lost.answer),
        (
            byte_level(template(answer="{{ m.content[:20] }}")),
            Conversation.of("Why?", "Because it is, and it will be."),
            Lost.answer,
        ),
        (
            byte_level(template(question="{{ m.content[:15] }}")),
            Conversation.of("Why is the sky as blue as it is?", "So."),
            Lost.question,
        ),
        (
            byte_level(template(answer="{{ m.content | replace('B', 'A') }}")),
            Conversation.of("Why?", "Because."),
            Lost.answer,
        ),
        (byte_level(template(question="{{ m.content | e }}")), Conversation.of("Is 1 < 2?", "Yes."), Lost.question),
        (byte_level(PLAIN), Conversation.of("Why?", "It <|end|> is."), Lost.end_within),
        (words_only(PLAIN), Conversation.of("why is it so", "because 漢字"), Lost.answer),
        (words_only(PLAIN), Conversation.of("why is 漢字", "because"), Lost.question),
    ],
)
def test_text_that_does_not_reach_the_model_is_seen(tokenizer: Any, row: Conversation, lost: Lost) -> None:
    conversations, losses = Conversations(tokenizer), Losses()
    turn = conversations.lay_out(row)
    assert turn.lost == {lost}
    losses.count(row, turn, tokenizer)
    assert (losses.rows, losses.lost, losses.kinds[lost]) == (1, 1, 1)
    assert repr(row.turns[-1].text)[:10] in losses.sentences()[0]


def test_an_end_of_turn_in_an_answer_is_named_with_its_place_and_a_command_that_removes_it(tmp_path: Path) -> None:
    rows = [(f"q{i}", f"{'long ' * 40}so.<|end|>") for i in range(20)]
    with pytest.raises(InvalidInput) as refusal:
        load_examples(rows_file(tmp_path, rows), byte_level(PLAIN), 600)
    [said] = refusal.value.args
    assert "in 20 of 20 rows" in said
    assert "turn 2 of row 1" in said
    assert "so.<|end|>'" in said
    assert "another model" not in said, "the model is not at fault"
    command = said[said.index("sed ") :]
    (tmp_path / "ROWS.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    config = rows_file(tmp_path, rows)
    config.data.path = str(tmp_path / "CLEAN.jsonl")
    assert load_examples(config, byte_level(PLAIN), 600).rows_lost == 0


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('a system prompt must come first') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.nothing.at.all }}",
        "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
        "no messages at all",
        "{{ messages[-1].content }}",
        "{{ messages[0].content }}",
        "{{ messages }}",
        PLAIN.replace("m.content", "m.content[:1]"),
        "{% if",
    ],
)
def test_a_template_that_can_not_lay_out_a_question_and_its_answer_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="chat template"):
        Conversations(byte_level(text))


@pytest.mark.parametrize(
    "asks", ["{{ strftime_now('%d %B %Y %H:%M') }}", "{{ date_string }}", "{% set now = strftime_now %}{{ now('%c') }}"]
)
def test_the_same_rows_are_the_same_tokens_on_any_day(asks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, made = byte_level(asks + PLAIN), []
    real = chat_template_utils.datetime
    for day in (datetime.datetime(2026, 9, 30), datetime.datetime(2031, 1, 1, 7, 7)):

        class Then(datetime.datetime):
            @classmethod
            def now(cls, *_: Any, day: datetime.datetime = day) -> datetime.datetime:  # type: ignore[override]
                return day

        monkeypatch.setattr(chat_template_utils, "datetime", Then)
        made.append(tokenize(ROW, tokenizer, 10_000))
    monkeypatch.setattr(chat_template_utils, "datetime", real)
    assert made[0] == made[1]
    assert "202" in tokenizer.decode(made[0].ids) or "24" in tokenizer.decode(made[0].ids)


def rows_file(folder: Path, rows: list[tuple[str, str]]) -> TrialConfig:
    config = TrialConfig(seq_len=512, batch_size=1)
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": q, "output": a}) for q, a in rows))
    config.data.source, config.data.path = DataSource.jsonl, str(path)
    return config


def test_most_rows_without_their_text_are_refused_and_a_few_are_counted(tmp_path: Path) -> None:
    tokenizer = byte_level(template(answer=NO_THOUGHTS))
    rows = [(f"q{i}", f"<think>{i}</think>a{i}" if i < 4 else f"a{i}") for i in range(20)]
    made = load_examples(rows_file(tmp_path, rows), tokenizer, 600)
    assert made.rows_lost == 4
    assert any("in 4 of 20 rows" in remark for remark in made.remarks)
    rows = [(f"q{i}", f"<think>{i}</think>a{i}" if i < 11 else f"a{i}") for i in range(20)]
    with pytest.raises(InvalidInput, match="in 11 of 20 rows"):
        load_examples(rows_file(tmp_path, rows), tokenizer, 600)


def test_how_answers_end_is_known_and_said(tmp_path: Path) -> None:
    config = rows_file(tmp_path, [(f"q{i}", f"a{i}") for i in range(20)])
    assert load_examples(config, byte_level(PLAIN), 600).end_of_turn == "<|end|>"
    ours = load_examples(config, byte_level(template(end="")), 600)
    assert ours.end_of_turn == "<|end|>"
    assert any("ends no turn" in remark for remark in ours.remarks)
    never = load_examples(config, byte_level(template(end=""), eos_token=None), 600)
    assert never.end_of_turn == ""
    assert any("no end of turn" in remark for remark in never.remarks)


def test_a_token_without_an_embedding_is_refused_and_never_pads(tmp_path: Path) -> None:
    tokenizer = byte_level(PLAIN)
    config = rows_file(tmp_path, [(f"q{i}", f"a{i}") for i in range(20)])
    examples = load_examples(config, tokenizer, 10_000)
    highest = max(max(example.ids) for example in (*examples.train, *examples.heldout))
    check_token_ids(examples, tokenizer, highest + 1)
    with pytest.raises(InvalidInput, match=f"the tokenizer knows {len(tokenizer)} tokens, the model {highest}"):
        check_token_ids(examples, tokenizer, highest)
    assert pad_id(tokenizer, 600) == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"pad_token": "<|late|>"})
    assert pad_id(tokenizer, len(tokenizer) - 1) == tokenizer.eos_token_id
    assert pad_id(byte_level(PLAIN, eos_token=None, pad_token=None), 600) == 0


def test_the_shipped_rows_are_whole() -> None:
    made = load_examples(TrialConfig(seq_len=4096), tiny_tokenizer(), 10_000)
    assert made.rows_read == 432
    assert made.rows_lost == 0
