"""What is trained of conversations of many turns, against what the models' published formats say, written out by hand.

In the expected texts « and » stand around what is trained.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lora_lab.dataset.row import Conversation, Passage, Role, Turn
from lora_lab.options import TrainOn
from lora_lab.worker.conversation import Conversations
from lora_lab.worker.data import IGNORED
from lora_lab.worker.laid_out import LaidOut, Lost
from lora_lab.worker.passage import Passages
from lora_lab.worker.tokenising import tokenize
from tests.helpers.chat_templates import (
    CHATML,
    EVERY,
    GEMMA,
    LLAMA_2,
    LLAMA_3,
    MISTRAL,
    MISTRAL_1,
    PHI_3,
    QWEN_2_5,
    QWEN_3,
    QWEN_3_THINKING,
    R1,
    ZEPHYR,
    Published,
    tokenizer_of,
)

SYSTEM = Turn(Role.system, "Be brief.")
TURNS = (
    Turn(Role.user, "Hi there"),
    Turn(Role.assistant, "Hello!"),
    Turn(Role.user, "Is 2 + 2 4?"),
    Turn(Role.assistant, "Yes, it is."),
)

IM_TURNS = (
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>»\n"
    "<|im_start|>user\nIs 2 + 2 4?<|im_end|>\n<|im_start|>assistant\n«Yes, it is.<|im_end|>»"
)
QWEN_3_TURNS = (
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>»\n"
    "<|im_start|>user\nIs 2 + 2 4?<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nYes, it is.<|im_end|>»"
)
LLAMA_3_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello!<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nIs 2 + 2 4?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes, it is.<|eot_id|>»"
)
LLAMA_3_START = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
GEMMA_TURNS = (
    "Hi there<end_of_turn>\n<start_of_turn>model\n«Hello!<end_of_turn>»\n"
    "<start_of_turn>user\nIs 2 + 2 4?<end_of_turn>\n<start_of_turn>model\n«Yes, it is.<end_of_turn>»"
)
PHI_3_TURNS = (
    "<|user|>\nHi there<|end|>\n<|assistant|>\n«Hello!<|end|>»\n"
    "<|user|>\nIs 2 + 2 4?<|end|>\n<|assistant|>\n«Yes, it is.<|end|>»"
)
ZEPHYR_TURNS = (
    "<|user|>\nHi there</s>\n<|assistant|>\n«Hello!</s>»\n<|user|>\nIs 2 + 2 4?</s>\n<|assistant|>\n«Yes, it is.</s>»"
)

WITHOUT_SYSTEM = {
    CHATML: IM_TURNS,
    LLAMA_3: LLAMA_3_START + "<|eot_id|>" + LLAMA_3_TURNS,
    MISTRAL: "<s>[INST] Hi there[/INST]« Hello!</s>»[INST] Is 2 + 2 4?[/INST]« Yes, it is.</s>»",
    MISTRAL_1: "<s>[INST] Hi there [/INST]«Hello!</s>» [INST] Is 2 + 2 4? [/INST]«Yes, it is.</s>»",
    GEMMA: "<bos><start_of_turn>user\n" + GEMMA_TURNS,
    PHI_3: PHI_3_TURNS,
    QWEN_2_5: "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    + IM_TURNS,
    QWEN_3: QWEN_3_TURNS,
    ZEPHYR: ZEPHYR_TURNS,
    LLAMA_2: "<s>[INST] Hi there [/INST]« Hello! </s>»<s>[INST] Is 2 + 2 4? [/INST]« Yes, it is. </s>»",
    R1: "<|begin|><|User|>Hi there<|Assistant|>«Hello!<|end|>»<|User|>Is 2 + 2 4?<|Assistant|>«Yes, it is.<|end|>»",
}
WITH_SYSTEM = {
    CHATML: "<|im_start|>system\nBe brief.<|im_end|>\n" + IM_TURNS,
    LLAMA_3: LLAMA_3_START + "Be brief.<|eot_id|>" + LLAMA_3_TURNS,
    # the system prompt where the model sees it when it is asked the last question
    MISTRAL: "<s>[INST] Hi there[/INST]« Hello!</s>»[INST] Be brief.\n\nIs 2 + 2 4?[/INST]« Yes, it is.</s>»",
    MISTRAL_1: "<s>[INST] Be brief.\n\nHi there [/INST]«Hello!</s>» [INST] Is 2 + 2 4? [/INST]«Yes, it is.</s>»",
    GEMMA: "<bos><start_of_turn>user\nBe brief.\n\n" + GEMMA_TURNS,
    PHI_3: "<|system|>\nBe brief.<|end|>\n" + PHI_3_TURNS,
    QWEN_2_5: "<|im_start|>system\nBe brief.<|im_end|>\n" + IM_TURNS,
    QWEN_3: "<|im_start|>system\nBe brief.<|im_end|>\n" + QWEN_3_TURNS,
    ZEPHYR: "<|system|>\nBe brief.</s>\n" + ZEPHYR_TURNS,
    LLAMA_2: "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST]« Hello! </s>»"
    "<s>[INST] Is 2 + 2 4? [/INST]« Yes, it is. </s>»",
    R1: "<|begin|>Be brief.<|User|>Hi there<|Assistant|>«Hello!<|end|>»"
    "<|User|>Is 2 + 2 4?<|Assistant|>«Yes, it is.<|end|>»",
}


def marked(tokenizer: Any, laid: LaidOut) -> str:
    """The text of a row, with « and » around what is trained."""
    text, done = "", 0
    for start, end in laid.spans:
        text += f"{tokenizer.decode(laid.ids[done:start])}«{tokenizer.decode(laid.ids[start:end])}»"
        done = end
    return text + str(tokenizer.decode(laid.ids[done:]))


def in_one(tokenizer: Any, expected: str) -> list[int]:
    """The ids of the whole text, tokenised at once."""
    ids: list[int] = tokenizer(expected.replace("«", "").replace("»", ""), add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("published", EVERY, ids=lambda published: published.model)
def test_every_answer_and_its_end_are_trained_and_nothing_else(published: Published, with_system: bool) -> None:
    tokenizer = tokenizer_of(published)
    laid = Conversations(tokenizer).lay_out(Conversation((SYSTEM, *TURNS) if with_system else TURNS))
    expected = (WITH_SYSTEM if with_system else WITHOUT_SYSTEM)[published]
    assert marked(tokenizer, laid) == expected
    assert laid.ids == in_one(tokenizer, expected), "tokenised as a whole"
    assert not laid.lost
    assert laid.merged == (with_system and published in (GEMMA, MISTRAL_1))


FORMATS = {  # what stands before the first turn, a question, an answer
    CHATML: ("", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "«{}<|im_end|>»\n"),
    LLAMA_3: (
        LLAMA_3_START + "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "«{}<|eot_id|>»",
    ),
    MISTRAL: ("<s>", "[INST] {}[/INST]", "« {}</s>»"),
    GEMMA: ("<bos>", "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "«{}<end_of_turn>»\n"),
    PHI_3: ("", "<|user|>\n{}<|end|>\n<|assistant|>\n", "«{}<|end|>»\n"),
    ZEPHYR: ("", "<|user|>\n{}</s>\n<|assistant|>\n", "«{}</s>»\n"),
    LLAMA_2: ("", "<s>[INST] {} [/INST]", "« {} </s>»"),
    R1: ("<|begin|>", "<|User|>{}<|Assistant|>", "«{}<|end|>»"),
}
SAID = st.one_of(
    st.sampled_from(["a", "user", "assistant", "model", "Yes", "-", "lora lab answers", "[INST", "</", "system"]),
    st.text("ab .\nü漢", min_size=1, max_size=12).map(str.strip).filter(bool),
)


@pytest.mark.parametrize("published", FORMATS, ids=lambda published: published.model)
@settings(max_examples=40)
@given(said=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4), last_only=st.booleans())
def test_texts_that_come_again_or_look_like_the_template_change_nothing(
    published: Published, said: list[tuple[str, str]], last_only: bool
) -> None:
    tokenizer = tokenizer_of(published)
    before, question, answer = FORMATS[published]
    expected = before + "".join(question.format(asked) + answer.format(replied) for asked, replied in said)
    if last_only:
        earlier, mark, last = expected.rpartition("«")
        expected = earlier.replace("«", "").replace("»", "") + mark + last
    turns = [turn for pair in said for turn in map(Turn, (Role.user, Role.assistant), pair)]
    train_on = TrainOn.last_answer if last_only else TrainOn.answers
    laid = Conversations(tokenizer, None, train_on).lay_out(Conversation(tuple(turns)))
    assert marked(tokenizer, laid) == expected.rstrip("\n")
    assert not laid.lost
    assert laid.apart or laid.ids == in_one(tokenizer, expected.rstrip("\n"))


@settings(max_examples=40)
@given(said=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4))
def test_a_system_prompt_that_moves_from_turn_to_turn_is_where_the_last_question_has_it(
    said: list[tuple[str, str]],
) -> None:
    tokenizer = tokenizer_of(MISTRAL)
    turns = [turn for pair in said for turn in map(Turn, (Role.user, Role.assistant), pair)]
    laid = Conversations(tokenizer).lay_out(Conversation((SYSTEM, *turns)))
    earlier = "".join(f"[INST] {asked}[/INST]« {replied}</s>»" for asked, replied in said[:-1])
    asked, replied = said[-1]
    assert marked(tokenizer, laid) == f"<s>{earlier}[INST] Be brief.\n\n{asked}[/INST]« {replied}</s>»"
    assert not laid.lost


def test_what_is_given_is_only_read() -> None:
    tokenizer = tokenizer_of(CHATML)
    laid = Conversations(tokenizer).lay_out(Conversation((SYSTEM, *TURNS), given=4))
    assert marked(tokenizer, laid) == WITH_SYSTEM[CHATML].replace("«Hello!<|im_end|>»", "Hello!<|im_end|>")
    gemma = tokenizer_of(GEMMA)
    laid = Conversations(gemma).lay_out(Conversation((SYSTEM, *TURNS), given=4))
    assert marked(gemma, laid) == WITH_SYSTEM[GEMMA].replace("«Hello!<end_of_turn>»", "Hello!<end_of_turn>")


@pytest.mark.parametrize("published", EVERY, ids=lambda published: published.model)
def test_everything_is_trained_up_to_the_last_end_if_asked_for(published: Published) -> None:
    tokenizer = tokenizer_of(published)
    laid = Conversations(tokenizer, None, TrainOn.everything).lay_out(Conversation(TURNS))
    assert laid.spans == ((0, len(laid.ids)),)
    assert laid.ids == in_one(tokenizer, WITHOUT_SYSTEM[published])


THOUGHT = "<think>\nhm\n</think>\n\n"


def test_thoughts_of_the_last_answer_are_trained_and_of_earlier_ones_lost() -> None:
    tokenizer = tokenizer_of(QWEN_3)
    question, answer, *rest = TURNS
    last = Turn(Role.assistant, THOUGHT + "Yes.")
    laid = Conversations(tokenizer).lay_out(Conversation((question, answer, rest[0], last)))
    assert marked(tokenizer, laid).endswith(f"assistant\n«{THOUGHT}Yes.<|im_end|>»")
    assert not laid.lost
    both = Conversation((question, Turn(Role.assistant, THOUGHT + "Hello!"), rest[0], last))
    laid = Conversations(tokenizer).lay_out(both)
    assert laid.lost == {Lost.answer}
    assert marked(tokenizer, laid).count("«") == 1, "what is not as it was written is not trained"
    laid = Conversations(tokenizer, None, TrainOn.last_answer).lay_out(both)
    assert not laid.lost, "the model will not see earlier thoughts either"
    assert marked(tokenizer, laid).endswith(f"assistant\n«{THOUGHT}Yes.<|im_end|>»")


def test_reasoning_that_the_prompt_opens_goes_on_in_the_last_answer() -> None:
    tokenizer = tokenizer_of(R1)
    turns = (*TURNS[:3], Turn(Role.assistant, THOUGHT + "Yes."))
    laid = Conversations(tokenizer).lay_out(Conversation(turns))
    assert marked(tokenizer, laid).endswith("<|Assistant|><think>\n«hm\n</think>\n\nYes.<|end|>»")
    assert marked(tokenizer, laid).startswith("<|begin|><|User|>Hi there<|Assistant|>«Hello!<|end|>»")
    assert not laid.lost


def test_an_earlier_answer_without_the_thoughts_that_its_prompt_opens_is_found_behind_its_question() -> None:
    tokenizer = tokenizer_of(QWEN_3_THINKING)
    laid = Conversations(tokenizer).lay_out(Conversation((*TURNS[:3], Turn(Role.assistant, THOUGHT + "Yes."))))
    assert marked(tokenizer, laid) == (
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>»\n"
        "<|im_start|>user\nIs 2 + 2 4?<|im_end|>\n<|im_start|>assistant\n<think>\n«hm\n</think>\n\nYes.<|im_end|>»"
    )
    assert not laid.lost


@pytest.mark.parametrize(("reply", "lost"), [("t", True), ("<think>", True), ("<think>hm", False), ("think>hm", True)])
def test_only_a_start_that_the_prompt_has_may_be_missing_from_an_answer(reply: str, lost: bool) -> None:
    tokenizer = tokenizer_of.__wrapped__(QWEN_3_THINKING)  # its own, which is changed
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role ~ '\n' }}{% if m.role == 'assistant' %}{{ '<think>\n' ~ m.content"
        ".replace('<think>', '').replace('t', '') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n<think>\n' }}{% endif %}"
    )
    conversations = Conversations(tokenizer)
    said = (TURNS[0], Turn(Role.assistant, reply))
    for turns in (said, (*said, TURNS[2], Turn(Role.assistant, "Yes."))):
        assert (Lost.answer in conversations.lay_out(Conversation(turns)).lost) == lost


def test_calls_of_tools_are_trained_and_their_results_read() -> None:
    tokenizer = tokenizer_of(QWEN_3)
    call, result = '<tool_call>\n{"name": "add"}\n</tool_call>', "<tool_response>\n4\n</tool_response>"
    turns = (TURNS[2], Turn(Role.assistant, call), Turn(Role.user, result), TURNS[3])
    laid = Conversations(tokenizer).lay_out(Conversation(turns))
    assert not laid.lost
    assert marked(tokenizer, laid) == (
        f"<|im_start|>user\nIs 2 + 2 4?<|im_end|>\n<|im_start|>assistant\n«{call}<|im_end|>»\n"
        f"<|im_start|>user\n{result}<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nYes, it is.<|im_end|>»"
    )


def test_a_tokenizer_without_offsets_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(PHI_3)
    expected = Conversations(tokenizer).lay_out(Conversation((SYSTEM, *TURNS)))
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert Conversations(tokenizer).lay_out(Conversation((SYSTEM, *TURNS))) == expected


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        (TrainOn.answers, "2 + 2 =« 4.<|endoftext|>»"),
        (TrainOn.last_answer, "2 + 2 =« 4.<|endoftext|>»"),
        (TrainOn.everything, "«2 + 2 = 4.<|endoftext|>»"),
    ],
)
def test_a_passage_has_no_template_and_one_end(train_on: TrainOn, expected: str) -> None:
    tokenizer = tokenizer_of(PHI_3)
    laid = Passages(tokenizer, None, train_on).lay_out(Passage("2 + 2 =", " 4."))
    assert marked(tokenizer, laid) == expected
    assert not laid.lost
    text = Passages(tokenizer, None, train_on).lay_out(Passage("", "Once upon a time."))
    assert marked(tokenizer, text) == "«Once upon a time.<|endoftext|>»"


def test_a_passage_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = tokenizer_of.__wrapped__(LLAMA_3)  # its own, which is changed
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    laid = Passages(tokenizer).lay_out(Passage("2 + 2 =", " 4."))
    assert marked(tokenizer, laid) == "<|begin_of_text|>2 + 2 =« 4.<|eot_id|>»"
    tokenizer.chat_template = None
    labels = tokenize(Passage("2 + 2 =", " 4."), tokenizer, 100).labels
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == " 4.<|eot_id|>"
