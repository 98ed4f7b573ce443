"""What ships with the project keeps the form that its README states."""

import gzip
import json
from pathlib import Path
from typing import Any

import lora_lab

DATA = Path(lora_lab.__file__).parent / "dataset" / "data"


def chats() -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in (DATA / "lab_chat.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_conversation_has_roles_in_order_and_ends_with_the_assistant() -> None:
    for turns in chats():
        roles = [turn["role"] for turn in turns]
        exchanges = roles[roles[0] == "system" :]
        assert exchanges == ["user", "assistant"] * (len(exchanges) // 2)
        assert 2 <= len(exchanges) // 2 <= 5
        assert all(turn["content"].strip() == turn["content"] != "" for turn in turns)


def test_no_two_conversations_begin_with_the_same_question() -> None:
    first = [next(turn["content"] for turn in turns if turn["role"] == "user") for turns in chats()]
    assert len(set(first)) == len(first) == 251


def test_passages_of_general_text_are_distinct_and_of_the_stated_length() -> None:
    lines = gzip.decompress((DATA / "general_text.jsonl.gz").read_bytes()).decode().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(set(texts)) == len(texts) == 183
    assert all(100 <= len(text.split()) <= 300 for text in texts)
