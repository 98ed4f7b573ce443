"""Lay out a row by the model's chat template: the tokens that the model reads, and which of them are trained.

The whole conversation is tokenised once and cut where the answer begins. Each row is then checked: its question and its
answer must be whole in the tokens, and exactly one end of turn must be trained, as the last token.
"""

import contextlib
import datetime
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from lora_lab.config import InvalidInput
from lora_lab.dataset.rows import Row

_CLOCK = datetime.datetime(2024, 7, 26, 12)
"""The date that templates get as today, so that rows have the same tokens every day: Llama 3's own default."""

_QUESTION, _ANSWER = "lora lab asks", "lora lab answers"
"""Texts to try a template with, before any row."""

_RENDERING = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""What a template can raise: its own exception, and errors in its expressions."""


class Lost(Enum):
    """What can be wrong with a row's tokens, in words that follow 'in N of M rows'."""

    answer = "the answer is not whole in the trained tokens"
    question = "the question is not whole in the tokens before the answer"
    end = "the end of the turn is not trained exactly once, as the last token"


@dataclass(frozen=True, slots=True)
class Turn:
    """One row as token ids. The first `prompt` of `ids` are read only, the rest is trained."""

    ids: list[int]
    prompt: int
    lost: frozenset[Lost] = frozenset()
    apart: bool = False
    """A token spans the end of the prompt, so prompt and answer were tokenised separately."""
    unopened: bool = False
    """The generation prompt ends in text that this row is trained without."""


@dataclass(slots=True)
class Losses:
    """How many rows are not laid out as they should be, with the first row of each kind."""

    rows: int = 0
    lost: int = 0
    """Rows with at least one fault."""
    apart: int = 0
    unopened: int = 0
    kinds: Counter[Lost] = field(default_factory=Counter)
    examples: dict[Lost, str] = field(default_factory=dict)

    def count(self, row: Row, turn: Turn, tokenizer: Any) -> None:
        """Count one row."""
        self.rows += 1
        self.lost += bool(turn.lost)
        self.apart += turn.apart
        self.unopened += turn.unopened
        for kind in turn.lost:
            self.kinds[kind] += 1
            if kind not in self.examples:
                read = tokenizer.decode(turn.ids[: turn.prompt])
                trained = tokenizer.decode(turn.ids[turn.prompt :])
                self.examples[kind] = (
                    f"row {self.rows} has the question {_short(row.prompt)} and the answer {_short(row.response)}; "
                    f"the model reads {_short(read)} and is trained on {_short(trained)}"
                )

    def sentences(self) -> list[str]:
        """Return what the user should know of each kind of fault."""
        return [
            f"in {self.kinds[kind]} of {self.rows} rows {kind.value}. For example, {self.examples[kind]}"
            for kind in Lost
            if self.kinds[kind]
        ]


class Conversations:
    """Lays out rows with one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Try the template with a question and an answer of our own.

        Args:
            vocab_size: ids from here on have no embedding, and are not used as an end of turn; None where unknown.

        Raises: InvalidInput when the template raises, or does not show both texts.
        """
        self._tokenizer = tokenizer
        self._as_parts = False
        self._tail = self._choose_form()
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        eos = tokenizer.eos_token_id
        self._eos = eos if eos is not None and (vocab_size is None or eos < vocab_size) else None
        tail_ids = self._encode(self._tail)
        self._ends = next((token for token in tail_ids if token in self._special), None)

    @property
    def end_of_turn(self) -> str:
        """Return the token that ends an answer, or the text where it is not a single token; empty when nothing does."""
        if self._ends is not None:
            return str(self._tokenizer.convert_ids_to_tokens(self._ends))
        if self._tail.strip():
            return self._tail.strip()
        return "" if self._eos is None else str(self._tokenizer.eos_token)

    @property
    def end_is_ours(self) -> bool:
        """Return True where the template ends no turn, so the tokenizer's end of text is added to each answer."""
        return self._ends is None and not self._tail.strip() and self._eos is not None

    def turn(self, row: Row) -> Turn:
        """Lay out one row.

        Raises: InvalidInput when the template raises."""
        whole, start, answer, unopened = self._laid_out(row)
        end = len(whole) - len(self._tail) if whole.endswith(self._tail) else len(whole)
        if self._ends is None:  # a marker in plain text is trained, but not the space after it
            whole = whole.rstrip() if self._tail.strip() else whole[:end]
        ids, prompt, ended, apart = self._tokens(whole, start, end)
        if self._ends is not None:
            # what follows the end of the turn is never generated, so it is not trained
            stop = next((i for i, token in enumerate(ids[ended:]) if token in self._special), len(ids))
            ids = ids[: ended + stop + 1]
        elif self._eos is not None and self.end_is_ours:
            ids = [*ids, self._eos]
        lost = set(self._look(Row(row.prompt, answer), ids, prompt))
        if _spaceless(answer) not in _spaceless(whole[start:]):
            lost.add(Lost.answer)
        if _spaceless(row.prompt) not in _spaceless(whole[:start]):
            lost.add(Lost.question)
        return Turn(ids, prompt, frozenset(lost), apart, unopened)

    def _choose_form(self) -> str:
        """Find out whether content is a string or a list of parts; returns what follows an answer."""
        row, faults = Row(_QUESTION, _ANSWER), []
        for self._as_parts in (False, True):
            try:
                prompt, whole = self._render(row, True), self._render(row, False)
            except _RENDERING as error:
                faults.append(str(error).strip() or type(error).__name__)
                continue
            quoted = any(f"{mark}{_ANSWER}{mark}" in whole for mark in "'\"")  # a list shown as a list
            if _QUESTION in prompt and _QUESTION in whole.partition(_ANSWER)[0] and _ANSWER in whole and not quoted:
                return whole.rpartition(_ANSWER)[2]
        if faults:
            raise InvalidInput(
                f"the model's chat template can't lay out a question and its answer: {faults[0]}. Use a model with "
                "another template, or change chat_template in the model's folder."
            )
        raise InvalidInput(
            "the model's chat template leaves out the question or the answer, whether they are given as text or as "
            "parts. Use a model with another template."
        )

    def _laid_out(self, row: Row) -> tuple[str, int, str, bool]:
        """Return the text of the conversation, where its trained part starts, the answer that this part must hold, and
        whether the generation prompt ends in text that the conversation does not have."""
        try:
            prompt, whole = self._render(row, True), self._render(row, False)
        except _RENDERING as error:
            raise InvalidInput(
                f"the model's chat template can't lay out the row with the question {_short(row.prompt)}: {error}. "
                "Change the row, or use a model with another template."
            ) from error
        if whole.startswith(prompt):
            return whole, len(prompt), row.response, False
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
        opening = prompt[shared:]
        if opening.strip() and row.response.startswith(opening.strip()):
            # R1's prompt opens the reasoning itself: an answer that brings its own goes on from there
            rest = row.response.removeprefix(opening.strip()).removeprefix(opening[len(opening.rstrip()) :])
            return prompt + rest + self._tail, len(prompt), rest, False
        found = whole.rfind(row.response, 0, len(whole) - len(self._tail))
        start = shared if found < 0 else min(shared, found)
        return whole, start, row.response, bool(opening.strip())

    def _render(self, row: Row, for_generation: bool) -> str:
        turns = [("user", row.prompt)] if for_generation else [("user", row.prompt), ("assistant", row.response)]
        messages = [{"role": role, "content": self._content(text)} for role, text in turns]
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

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _tokens(self, whole: str, start: int, end: int) -> tuple[list[int], int, int, bool]:
        """Tokenise `whole`: its ids, how many come before `start` and before `end`, and if a token spans `start`."""
        if getattr(self._tokenizer, "is_fast", False):
            made = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            spans = made["offset_mapping"]
            prompt = sum(first < start for first, _ in spans)
            if not any(first < start < last for first, last in spans):
                return made["input_ids"], prompt, prompt + sum(first < end for first, _ in spans[prompt:]), False
        else:
            before, ids, answered = self._encode(whole[:start]), self._encode(whole), self._encode(whole[:end])
            if ids[: len(before)] == before:
                ended = len(answered) if ids[: len(answered)] == answered else len(ids)
                return ids, len(before), ended, False
        before, answer, rest = (self._encode(text) for text in (whole[:start], whole[start:end], whole[end:]))
        return [*before, *answer, *rest], len(before), len(before) + len(answer), True

    def _look(self, row: Row, ids: list[int], prompt: int) -> Iterator[Lost]:
        """Compare the tokens with the row's own text."""
        if _bare(row.response) not in _bare(self._tokenizer.decode(ids[prompt:])):
            yield Lost.answer
        if _bare(row.prompt) not in _bare(self._tokenizer.decode(ids[:prompt])):
            yield Lost.question
        ends = self._eos if self.end_is_ours else self._ends
        if ends is not None and (ids[prompt:].count(ends) != 1 or ids[-1] != ends):
            yield Lost.end


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


def _spaceless(text: str) -> str:
    """Remove the spaces that templates trim and add."""
    return "".join(text.split())


def _bare(text: str) -> str:
    """Remove what tokenizers change on purpose: spaces, case, and the several ways to write one character."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(
        c for c in folded if not c.isspace() and c != "\u2581" and unicodedata.category(c) not in ("Cc", "Cf")
    )


def _short(text: str) -> str:
    """Quote a text for a message."""
    return repr(text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}")
