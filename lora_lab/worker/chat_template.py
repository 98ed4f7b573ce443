"""Render turns by a model's chat template, and find out by trial what the template puts around them."""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from lora_lab.config import InvalidInput
from lora_lab.dataset.row import Role, Turn
from lora_lab.worker.laid_out import short

_CLOCK = datetime.datetime(2024, 7, 26, 12)
"""The date that templates get as today, so that rows have the same tokens every day: Llama 3's own default."""

_SYSTEM = Turn(Role.system, "lora lab rules")
_QUESTION, _ANSWER = Turn(Role.user, "lora lab asks"), Turn(Role.assistant, "lora lab answers")
_NEXT_QUESTION, _NEXT_ANSWER = Turn(Role.user, "lora lab wonders"), Turn(Role.assistant, "lora lab replies")
"""Texts to try a template with, before any row."""

_RENDERING = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""What a template can raise: its own exception, and errors in its expressions."""


@dataclass(frozen=True, slots=True)
class Joint:
    """What a template puts between a question and its answer."""

    opening: str
    """What the generation prompt has after the question."""
    lead: str
    """What comes then, before the answer."""


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """Try the template with a question and an answer of our own.

        Raises: InvalidInput when the template raises, or does not show both texts.
        """
        self._tokenizer = tokenizer
        self._as_parts = False
        prompt, whole = self._choose_form()
        self.tail = whole.rpartition(_ANSWER.text)[2]
        """What follows the last answer."""
        shared = len(_shared(prompt, whole))
        self.unused = prompt[shared:]
        """The end of the generation prompt that a conversation does not have: the start of a reasoning, as a rule."""
        self.lead = whole[shared : whole.rindex(_ANSWER.text)]
        """What comes between the generation prompt and the last answer."""

    def render(self, turns: Sequence[Turn], for_generation: bool = False) -> str:
        """Return the text of a conversation, or the prompt for its next answer.

        Raises: InvalidInput when the template raises."""
        try:
            return self._render(turns, for_generation)
        except _RENDERING as error:
            raise InvalidInput(
                f"the model's chat template can't lay out the row that begins with {short(turns[0].text)}: {error}. "
                "Change the row, or use a model with another template."
            ) from error

    @cached_property
    def has_system(self) -> bool:
        """Return whether the template shows a system prompt. Gemma's raises; Phi-3's first one left it out."""
        try:
            return _SYSTEM.text in self._render([_SYSTEM, _QUESTION], True)
        except _RENDERING:
            return False

    @cached_property
    def joints(self) -> list[Joint]:
        """Return what comes between question and answer, first in an earlier exchange and then in the last."""
        try:
            whole = self._render([_QUESTION, _ANSWER, _NEXT_QUESTION, _NEXT_ANSWER])
            prompt = self._render([_QUESTION], True)
        except _RENDERING:
            return []
        found = []
        for question, answer in ((_QUESTION, _ANSWER), (_NEXT_QUESTION, _NEXT_ANSWER)):
            between = whole.partition(question.text)[2].partition(answer.text)[0]
            opening = _shared(prompt.partition(_QUESTION.text)[2], between)
            found.append(Joint(opening, between[len(opening) :]))
        return found

    @cached_property
    def end(self) -> str:
        """Return what follows every answer, the last and earlier ones."""
        try:
            whole = self._render([_QUESTION, _ANSWER, _NEXT_QUESTION, _NEXT_ANSWER])
        except _RENDERING:
            return self.tail
        return _shared(whole.partition(_ANSWER.text)[2], whole.rpartition(_NEXT_ANSWER.text)[2])

    def _choose_form(self) -> tuple[str, str]:
        """Find out whether content is a string or a list of parts; returns a prompt and the whole conversation."""
        faults = []
        for self._as_parts in (False, True):
            try:
                prompt, whole = self._render([_QUESTION], True), self._render([_QUESTION, _ANSWER])
            except _RENDERING as error:
                faults.append(str(error).strip() or type(error).__name__)
                continue
            quoted = any(f"{mark}{_ANSWER.text}{mark}" in whole for mark in "'\"")  # a list shown as a list
            both = _QUESTION.text in whole.partition(_ANSWER.text)[0] and _ANSWER.text in whole
            if _QUESTION.text in prompt and both and not quoted:
                return prompt, whole
        if faults:
            raise InvalidInput(
                f"the model's chat template can't lay out a question and its answer: {faults[0]}. Use a model with "
                "another template, or change chat_template in the model's folder."
            )
        raise InvalidInput(
            "the model's chat template leaves out the question or the answer, whether they are given as text or as "
            "parts. Use a model with another template."
        )

    def _render(self, turns: Sequence[Turn], for_generation: bool = False) -> str:
        messages = [{"role": turn.role.value, "content": self._content(turn.text)} for turn in turns]
        with _clock_held_still():
            rendered: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=for_generation,
                date_string=_CLOCK.strftime("%d %b %Y"),
            )
        return rendered

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._as_parts else text


def _shared(one: str, other: str) -> str:
    """Return what both texts begin with."""
    differs = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(min(one, other, key=len))
    )
    return one[:differs]


@contextlib.contextmanager
def _clock_held_still() -> Iterator[None]:
    """Fix the date for templates. They ask transformers' strftime_now, which reads its module's clock."""
    real = chat_template_utils.datetime

    class Still(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Still":
            return cls(*_CLOCK.timetuple()[:6], tzinfo=tz)

    chat_template_utils.datetime = Still
    try:
        yield
    finally:
        chat_template_utils.datetime = real
