"""Lay out rows of either kind: conversations by the model's chat template, passages without one."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from lora_lab.config import InvalidInput
from lora_lab.dataset.row import Conversation, Passage, Row
from lora_lab.options import TrainOn
from lora_lab.worker.conversation import Conversations
from lora_lab.worker.laid_out import LaidOut, Losses, Lost
from lora_lab.worker.passage import Passages


class Layouts:
    """Lays out the rows of one data set with one tokenizer. A base model without a chat template takes passages."""

    def __init__(self, tokenizer: Any, vocab_size: int | None, train_on: TrainOn) -> None:
        """Take the tokenizer; the chat template is tried with the first conversation.

        Args:
            vocab_size: ids from here on have no embedding, and end nothing; None where unknown.
        """
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._train_on = train_on

    def lay_out(self, row: Row) -> LaidOut:
        """Lay out one row.

        Raises: InvalidInput when the chat template is missing or can't lay out the row."""
        return self._passages.lay_out(row) if isinstance(row, Passage) else self._conversations.lay_out(row)

    @property
    def end_of_turn(self) -> str:
        """Return what ends each answer, or passage; empty when nothing does."""
        used = self._conversations if self._has_conversations else self._passages
        return used.end_of_turn

    def remarks(self, losses: Losses) -> list[str]:
        """Return what the user should know of how the rows were laid out."""
        found = losses.sentences()
        if losses.unopened:
            found.append(
                f"the chat template's generation prompt ends in text (the start of a reasoning, as a rule) without "
                f"which {losses.unopened} of {losses.rows} rows are trained"
            )
        if losses.merged:
            found.append(
                f"the chat template has no system prompt: in {losses.merged} of {losses.rows} rows it stands at the "
                "start of the first question"
            )
        if self._has_conversations and self._conversations.end_is_ours:
            found.append(
                f"the chat template ends no turn: the tokenizer's end of text ({self.end_of_turn}) is trained after "
                "each answer"
            )
        elif not self.end_of_turn:
            found.append(
                "no end of turn is trained, since neither the chat template nor the tokenizer has one: the model does "
                "not learn to stop"
            )
        return found

    def remedies(self, rows: Iterable[Row], losses: Losses) -> list[str]:
        """Return what may help when most rows lose text, besides what their own sentences say."""
        if not losses.kinds.keys() - {Lost.end_within}:
            return []
        found = [
            "The model would not be trained on your rows. Change the rows, change chat_template in the model's folder, "
            "or use another model."
        ]
        many = any(isinstance(row, Conversation) and len(row.answers) > 1 for row in rows)
        if many and self._train_on is not TrainOn.last_answer:
            found.append(
                "If the template changes earlier answers only (Qwen 3 leaves their thoughts out), use "
                "data.train_on=last_answer."
            )
        return found

    @property
    def _has_conversations(self) -> bool:
        return "_conversations" in self.__dict__

    @cached_property
    def _conversations(self) -> Conversations:
        if self.tokenizer.chat_template is None:
            raise InvalidInput(
                "the model has no chat template, and these rows are conversations. Use an instruct model, or train on "
                "plain text: data=text, or data=completion with your columns named by data.map.prompt=... and "
                "data.map.completion=.... These two are joined as they are, so write the space between them."
            )
        return Conversations(self.tokenizer, self._vocab_size, self._train_on)

    @cached_property
    def _passages(self) -> Passages:
        return Passages(self.tokenizer, self._vocab_size, self._train_on)
