"""Lay out what the user types as the model has seen it in training."""

from typing import Any

from jinja2.exceptions import TemplateError

Message = dict[str, Any]


def prompt_text(tokenizer: Any, messages: list[Message]) -> str:
    """Return the text that the model goes on with: the conversation by the chat template, up to where the answer
    begins. Without a template it is the last message as it is.

    Args:
        messages: `role` and `content` each; a system prompt comes first.
    """
    if tokenizer.chat_template is None:
        return str(messages[-1]["content"])
    return _with_system(tokenizer, messages) or _rendered(tokenizer, _merged(messages))


def _with_system(tokenizer: Any, messages: list[Message]) -> str:
    """Return the rendered conversation; empty where the template has no place for its system prompt."""
    first = messages[0]
    if first["role"] != "system":
        return _rendered(tokenizer, messages)
    try:
        text = _rendered(tokenizer, messages)
    except (TemplateError, TypeError, ValueError):
        return ""
    return text if first["content"].strip() in text else ""


def _merged(messages: list[Message]) -> list[Message]:
    """Put the system prompt at the start of the first question, as Gemma's own template does."""
    system, question, *rest = messages
    return [{"role": question["role"], "content": f"{system['content']}\n\n{question['content']}"}, *rest]


def _rendered(tokenizer: Any, messages: list[Message]) -> str:
    """Render with contents as text, or as parts where the template needs that."""
    asked = {"tokenize": False, "add_generation_prompt": True}
    try:
        text = str(tokenizer.apply_chat_template(messages, **asked))
        if messages[-1]["content"].strip() in text:
            return text
    except (TemplateError, TypeError):
        pass
    parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    return str(tokenizer.apply_chat_template(parts, **asked))
