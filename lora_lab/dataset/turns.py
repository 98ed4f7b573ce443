"""Read a list of messages, of OpenAI's or ShareGPT's kind, as the turns of a conversation.

Calls of tools and their results become text, in the form that Qwen's and Hermes' templates give them.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from lora_lab.config import InvalidInput
from lora_lab.dataset.fields import Fields, text_of, written
from lora_lab.dataset.row import Role, Turn

_TOOL = "tool"

_SPEAKERS: dict[str, Role | str] = {
    **dict.fromkeys(("system", "developer"), Role.system),
    **dict.fromkeys(("user", "human", "prompter"), Role.user),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call"), Role.assistant),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function_response"), _TOOL),
}
"""What the layouts call those who speak."""


def turns_of(messages: object, column: str) -> tuple[Turn, ...]:
    """Return the turns of a list of messages.

    Raises: InvalidInput naming the message (counted from 1) and what to change."""
    if isinstance(messages, str):
        raise InvalidInput(
            f"{column} must be a list of messages, and is text. Write the list itself, not a text that holds it; "
            "for plain text use data=text."
        )
    if not isinstance(messages, list | tuple):
        raise InvalidInput(f"{column} must be a list of messages, and is {written(messages)}")
    turns: list[Turn] = []
    results = False
    for number, message in enumerate(messages, start=1):
        try:
            speaker, turn = _turn_of(message)
        except InvalidInput as fault:
            raise InvalidInput(f"message {number} of {column}: {fault}") from fault
        if speaker == _TOOL and results:  # several results answer one call
            turns[-1] = Turn(Role.user, f"{turns[-1].text}\n{turn.text}")
        elif turn.text or turn.role is not Role.system:  # an empty system prompt is none
            _check_order(turns, turn, f"message {number} of {column}")
            turns.append(turn)
        results = speaker == _TOOL
    return tuple(turns)


def _turn_of(message: object) -> tuple[Role | str, Turn]:
    if not isinstance(message, Mapping):
        raise InvalidInput(f"expected an object with role and content, found {written(message)}")
    key = next((key for key in ("role", "from") if message.get(key) is not None), None)
    if key is None:
        raise InvalidInput(f"it has no role; found {', '.join(map(_shown, message)) or 'nothing'}")
    speaker = _SPEAKERS.get(str(message[key]).strip().lower())
    if speaker is None:
        raise InvalidInput(
            f"the role {_shown(message[key])} is not known. Use system, user, assistant or tool (or ShareGPT's human, "
            "gpt)."
        )
    role = speaker if isinstance(speaker, Role) else Role.user
    text = _content_of(message)
    if speaker == _TOOL:
        text = f"<tool_response>\n{text}\n</tool_response>"
    elif message.get(key) == "function_call":
        text = f"<tool_call>\n{text}\n</tool_call>"
    text = "\n".join(filter(None, [text, *map(_call, _calls_of(message))]))
    if not text and role is not Role.system:
        raise InvalidInput(f"the turn of the {role.value} is empty. Write its text, or leave the row out.")
    return speaker, Turn(role, text, _is_trained(message))


def _is_trained(message: Fields) -> bool:
    """Return False for a turn with OpenAI's weight 0.

    Raises: InvalidInput for any other weight than 0 and 1."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise InvalidInput(f"its weight is {_shown(weight)}. Use 1 to train the turn, 0 to only read it.")
    return weight != 0


def _content_of(message: Fields) -> str:
    """Return a message's text, its parts joined, without the space around it; empty where it has none."""
    key = next((key for key in ("content", "value", "text") if message.get(key) is not None), None)
    if key is None:
        return ""
    if not isinstance(message[key], list):
        return text_of(message, key).strip()
    texts = []
    for part in message[key]:
        kind = part.get("type", "text") if isinstance(part, Mapping) else written(part)
        if not isinstance(part, Mapping) or kind != "text":
            raise InvalidInput(f"a part of its content is {_shown(kind)}; only text can be trained on")
        texts.append(text_of(part, "text"))
    return "".join(texts).strip()


def _calls_of(message: Fields) -> list[object]:
    calls = message.get("tool_calls")
    if calls is None:  # OpenAI's earlier form has one
        return [message["function_call"]] if message.get("function_call") else []
    if not isinstance(calls, list):
        raise InvalidInput(f"tool_calls must be a list, and is {written(calls)}")
    return calls


def _call(call: object) -> str:
    """Return a call of a tool as text, with its arguments as an object where they come as JSON in a text."""
    function: Any = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise InvalidInput("a call in tool_calls has no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # shown as the text that it is
            arguments = json.loads(arguments)
    made = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{made}\n</tool_call>"


def _check_order(before: list[Turn], turn: Turn, where: str) -> None:
    """Raise InvalidInput unless this turn can follow."""
    last = before[-1].role if before else None
    if turn.role is Role.system:
        if before:
            raise InvalidInput(f"{where} is of the system, and only the first can be. Join them into one at the start.")
    elif turn.role is Role.assistant and last is not Role.user:
        if last is Role.assistant:
            raise InvalidInput(f"{where} follows another of the assistant. Join the two, or leave the row out.")
        raise InvalidInput(f"{where}: the assistant speaks first. Put this text into a system message, or remove it.")
    elif turn.role is last:
        raise InvalidInput(f"{where} follows another of the user. Join the two, or leave the row out.")


def _shown(name: object) -> str:
    text = str(name)[:40]
    return text if text.isprintable() and text.isascii() else ascii(text)
