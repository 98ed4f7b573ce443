"""Lay out what the user types as the model has seen it in training."""

from collections.abc import Sequence

from lora_lab.dataset.row import Role, Turn
from lora_lab.worker.chat_template import ChatTemplate


def prompt_text(template: ChatTemplate | None, turns: Sequence[Turn]) -> str:
    """Return the text that the model goes on with: the conversation by the chat template, up to where the answer
    begins. Without a template it is the last turn as it is.

    A system prompt for which the template has no place stands at the start of the first question, as in training.

    Raises: InvalidInput when the template raises."""
    if template is None:
        return turns[-1].text
    first, *rest = turns
    if first.role is Role.system and not template.has_system:
        turns = [Turn(Role.user, f"{first.text}\n\n{rest[0].text}"), *rest[1:]]
    return template.render(turns, for_generation=True)
