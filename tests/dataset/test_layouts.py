"""Records of the public layouts become rows; what is no row is named, with what to type."""

from typing import Any

import pytest

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig, MapConfig
from lora_lab.dataset.layouts import map_fault
from lora_lab.dataset.row import Conversation, Passage, Role, Row, Turn
from lora_lab.dataset.rows import rows_of
from lora_lab.options import Layout

_ROLES = {"s": Role.system, "u": Role.user, "a": Role.assistant}


def read(*records: object, **data: Any) -> list[Row]:
    return [*rows_of(enumerate(records, start=1), DataConfig(**data), "data.path=rows.jsonl", "line")]


def refusal(*records: object, **data: Any) -> str:
    with pytest.raises(InvalidInput) as info:
        read(*records, **data)
    return str(info.value)


def talk(*turns: tuple[str, str], given: int = 0) -> Conversation:
    return Conversation(tuple(Turn(_ROLES[role], text) for role, text in turns), given)


def openai(*messages: tuple[str, object]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def sharegpt(*messages: tuple[str, object]) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": content} for role, content in messages]}


SHORT = talk(("u", "Why?"), ("a", "So."))
LONG = talk(("s", "Be brief."), ("u", "Why?"), ("a", "So."), ("u", "Really?"), ("a", "Yes."))


@pytest.mark.parametrize(
    ("record", "row"),
    [
        (openai(("user", " Why?\n"), ("assistant", "So.")), SHORT),
        (
            openai(
                *(("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "Really?")),
                ("assistant", "Yes."),
            ),
            LONG,
        ),
        (
            openai(("developer", "Be brief."), ("user", "Why?"), ("assistant", "So.")),
            talk(("s", "Be brief."), ("u", "Why?"), ("a", "So.")),
        ),
        (openai(("system", ""), ("user", "Why?"), ("assistant", "So.")), SHORT),
        (openai(("user", [{"type": "text", "text": "Why?"}]), ("assistant", "So.")), SHORT),
        (openai(("user", "Why?"), ("assistant", "So."), ("user", "Thanks")), SHORT),
        (sharegpt(("human", "Why?"), ("gpt", "So.")), SHORT),
        (
            sharegpt(("system", "Be brief."), ("human", "Why?"), ("gpt", "So."), ("human", "Really?"), ("gpt", "Yes.")),
            LONG,
        ),
        ({"conversations": openai(("user", "Why?"), ("assistant", "So."))["messages"]}, SHORT),
        ({"instruction": "Why?", "output": "So."}, SHORT),
        ({"instruction": "Why?", "input": "", "output": "So.", "text": "all of it"}, SHORT),
        ({"instruction": "Why?", "context": "sky", "response": "So."}, talk(("u", "Why?\n\nsky"), ("a", "So."))),
        ({"question": "Why?", "answer": "So."}, SHORT),
        ({"prompt": "Why?", "response": "So."}, SHORT),
        ({"prompt": "Why?", "completion": " So."}, Passage("Why?", " So.")),
        (
            {
                "prompt": openai(("user", "Why?"), ("assistant", "So."), ("user", "Really?"))["messages"],
                "completion": openai(("assistant", "Yes."))["messages"],
            },
            talk(("u", "Why?"), ("a", "So."), ("u", "Really?"), ("a", "Yes."), given=3),
        ),
        ({"text": " Once upon a time.\n"}, Passage("", " Once upon a time.\n")),
    ],
)  # fmt: skip
def test_a_layout_is_found_from_its_columns(record: dict[str, object], row: Row) -> None:
    assert read(record, record) == [row, row]


def test_calls_of_tools_and_their_results_are_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": "zwö"}'}}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "tool", "tool_call_id": "1", "content": ""},
        {"role": "assistant", "content": "Four."},
    ]
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "zwö"}}\n</tool_call>'
    results = "<tool_response>\n4\n</tool_response>\n<tool_response>\n\n</tool_response>"
    expected = talk(("u", "Add."), ("a", f"{called}\n{called}"), ("u", results), ("a", "Four."))
    assert read({"messages": messages}) == [expected]
    older = {"role": "assistant", "content": None, "function_call": call["function"]}
    first, _, *rest = messages
    assert read({"messages": [first, older, {"role": "function", "name": "add", "content": "4"}, rest[-1]]}) == [
        talk(("u", "Add."), ("a", called), ("u", "<tool_response>\n4\n</tool_response>"), ("a", "Four."))
    ]
    theirs = sharegpt(("human", "Add."), ("function_call", "add(2)"), ("observation", "4"), ("gpt", "Four."))
    assert [turn.role.value for turn in read(theirs)[0].turns] == ["user", "assistant", "user", "assistant"]  # type: ignore[union-attr]


def test_a_layout_that_is_given_reads_the_same_columns_otherwise() -> None:
    pair = {"prompt": "Why?", "completion": "So."}
    assert read(pair, layout=Layout.instruct) == [SHORT]
    both = {"text": "all of it", "instruction": "Why?", "output": "So."}
    assert read(both, layout=Layout.text) == [Passage("", "all of it")]
    told = refusal(pair, layout=Layout.chat)
    assert "data.layout=chat, and these are prompts and completions" in told
    assert "data.layout=completion" in told


@pytest.mark.parametrize(
    ("columns", "record", "row"),
    [
        ({"messages": "dialog"}, {"dialog": openai(("user", "Why?"), ("assistant", "So."))["messages"]}, SHORT),
        ({"instruction": "frage", "output": "antwort"}, {"frage": "Why?", "antwort": "So."}, SHORT),
        ({"output": "antwort"}, {"instruction": "Why?", "antwort": "So."}, SHORT),
        ({"completion": "out"}, {"prompt": "Why?", "out": "So."}, Passage("Why?", "So.")),
        ({"text": "body"}, {"body": "So.", "text": "no"}, Passage("", "So.")),
        ({"instruction": "prompt", "output": "chosen"}, {"prompt": "Why?", "chosen": "So.", "rejected": "No."}, SHORT),
    ],
)
def test_columns_of_other_names(columns: dict[str, str], record: dict[str, object], row: Row) -> None:
    assert read(record, map=MapConfig(**columns)) == [row]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["preference data", "{instruction: prompt, output: chosen}"]),
        ({"chosen": "a", "rejected": "b"}, ["preference data", "data.map={text: chosen}"]),
        ({"chosen": [], "rejected": []}, ["preference data", "data.map={messages: chosen}"]),
        ({"prompt": "a", "completion": "b", "label": True}, ["preference data without pairs"]),
        ({"text": "a", "label": 1}, ["data for classification", "data=text"]),
        ({"input_ids": [1], "labels": [1]}, ["tokenised already"]),
        ({"anchor": "a", "positive": "b"}, ["data for embeddings"]),
    ],
)
def test_data_of_other_kinds_of_training_is_called_so(record: dict[str, object], words: list[str]) -> None:
    told = refusal(record, record)
    assert [word for word in [*words, "chat (messages", "completion (prompt and"] if word not in told] == []
    assert "broken" not in told


def test_unknown_columns_are_said_once_with_the_setting_that_names_them() -> None:
    told = refusal(*[{"frage": "a", "antwort": "b"}] * 60)
    assert "60 broken line(s)" in told
    assert told.count("frage, antwort.") == 1
    assert '"data.map={instruction: frage, output: antwort}"' in told


def test_columns_that_could_hold_text_are_offered_for_the_layout_that_is_wanted() -> None:
    told = refusal({"id": 1, "frage": "a", "tags": [], "antwort": "b"})
    assert '"data.map={instruction: frage, output: antwort}"' in told
    told = refusal({"dialog": []}, layout=Layout.chat)
    assert "data.layout=chat needs messages" in told
    assert '"data.map={messages: dialog}"' in told


def test_a_map_is_of_one_layout() -> None:
    assert map_fault(DataConfig()) == ""
    assert map_fault(DataConfig(map=MapConfig(prompt="a"), layout=Layout.completion)) == ""
    told = map_fault(DataConfig(map=MapConfig(prompt="a"), layout=Layout.chat))
    assert "data.map names prompt" in told
    assert told.endswith("for chat: messages.")


def test_mixed_layouts_are_named_by_their_rows() -> None:
    alpaca = {"instruction": "Why?", "output": "So."}
    chat = openai(("user", "Why?"), ("assistant", "So."))
    preferred = {"prompt": "a", "chosen": "b", "rejected": "c"}
    told = refusal(alpaca, chat, alpaca, chat, preferred, {"instruction": "Why?"})
    assert "lines 2, 4: OpenAI chat (messages), while the rows before are Alpaca (instruction, output)" in told
    assert "line 5: this is preference data" in told
    assert "line 6: no column output" in told


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("user: Why?", ["must be a list of messages, and is text", "data=text"]),
        (None, ["must be a list of messages, and is null"]),
        ([], ["no turn of the assistant"]),
        (["Why?"], ["message 1", "found text"]),
        ([{"content": "Why?"}], ["message 1", "no role", "content"]),
        ([{"role": "robot", "content": "Why?"}], ["message 1", "the role robot is not known", "assistant"]),
        ([("user", "Why?")], ["no turn of the assistant"]),
        ([("user", "Why?"), ("system", "x"), ("assistant", "So.")], ["message 2", "of the system", "Join them"]),
        ([("assistant", "So."), ("user", "Why?")], ["message 1", "speaks first", "remove it"]),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], ["message 2", "another of the user", "Join the two"]),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c")], ["message 3", "follows another of the assistant"]),
        ([("user", " \n"), ("assistant", "b")], ["message 1", "turn of the user is empty", "leave the row out"]),
        ([("user", "a"), ("assistant", None)], ["message 2", "turn of the assistant is empty"]),
        ([("user", 3), ("assistant", "b")], ["message 1", "content must be text, and is 3"]),
        ([("user", [{"type": "image_url"}]), ("assistant", "b")], ["message 1", "image_url", "only text"]),
        ([("user", "a\ud83d"), ("assistant", "b")], ["message 1", "half of a character"]),
        ([{"role": "assistant", "tool_calls": "f()"}], ["tool_calls must be a list, and is text"]),
        ([{"role": "assistant", "tool_calls": [{"id": 1}]}], ["no function with a name"]),
        ([{"role": "\u202erobot", "content": "Why?"}], ["the role '\\u202erobot'"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_conversation_names_row_message_and_remedy(messages: Any, words: list[str]) -> None:
    if isinstance(messages, list):
        pairs = ({"role": one[0], "content": one[1]} if isinstance(one, tuple) else one for one in messages)
        messages = [*pairs]
    told = refusal(openai(("user", "Why?"), ("assistant", "So.")), {"messages": messages})
    assert [word for word in ["1 broken line(s)", "line 2: ", *words] if word not in told] == [], told


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "Why?", "completion": ["So."]}, ["prompt is text and completion is a list", "two lists"]),
        ({"prompt": "Why?", "completion": " "}, ["completion must not be empty"]),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]},
            ["message 2 of prompt and completion", "follows another of the user"],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "completion": [{"role": "user", "content": "b"}],
            },
            ["completion must begin with a turn of the assistant"],
        ),
        ({"text": "\n"}, ["text must not be empty"]),
        ({"text": ["a"]}, ["text must be text, and is a list"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_passage_is_named(record: dict[str, object], words: list[str]) -> None:
    told = refusal(record)
    assert [word for word in ["line 1: ", *words] if word not in told] == [], told


def test_rows_without_an_answer_are_left_out_where_that_is_asked_for() -> None:
    records = [*enumerate([{"question": "a", "answer": " "}, {"question": "Why?", "answer": "So."}])]
    assert [*rows_of(records, DataConfig(), "data.id=x", "row", leave_out_empty=True)] == [SHORT]


def test_a_turn_of_weight_0_is_read_and_not_trained() -> None:
    said = [("user", 1), ("assistant", 0), ("user", None), ("assistant", 1), ("user", None), ("assistant", 0)]
    messages = [
        {"role": role, "content": f"{place}"} | ({} if weight is None else {"weight": weight})
        for place, (role, weight) in enumerate(said)
    ]
    [row] = rows_of([(1, {"messages": messages})], DataConfig(), "here", "line")
    assert isinstance(row, Conversation)
    assert row.answers == [3]
    assert len(row.turns) == 4  # what follows the last trained answer is left out
    with pytest.raises(InvalidInput, match=r"message 2 of messages: its weight is 0\.5"):
        [*rows_of([(1, {"messages": [messages[0], messages[1] | {"weight": 0.5}]})], DataConfig(), "here", "line")]
