"""Lay out a passage: plain text with no chat template around it, from the start of a text to its end."""

from typing import Any

from lora_lab.dataset.row import Passage
from lora_lab.options import TrainOn
from lora_lab.worker.laid_out import LaidOut, Lost, bare
from lora_lab.worker.tokens import encode, tokens_of


class Passages:
    """Lays out passages with one tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int | None = None, train_on: TrainOn = TrainOn.answers) -> None:
        """See what the tokenizer puts before a text.

        Args:
            vocab_size: an end of text from here on has no embedding, and is not used; None where unknown.
        """
        self._tokenizer = tokenizer
        self._prompt_too = train_on is TrainOn.everything
        plain, added = encode(tokenizer, "a"), tokenizer("a")["input_ids"]
        begins = next((at for at in range(len(added)) if added[at : at + len(plain)] == plain), 0)
        self._before: list[int] = added[:begins]
        eos = tokenizer.eos_token_id
        self._after = [eos] if eos is not None and (vocab_size is None or eos < vocab_size) else []

    @property
    def end_of_turn(self) -> str:
        """Return the token that ends a passage; empty when nothing does."""
        return str(self._tokenizer.eos_token) if self._after else ""

    def lay_out(self, row: Passage) -> LaidOut:
        """Lay out one row."""
        edge = len(row.prompt)
        made = tokens_of(self._tokenizer, row.prompt + row.text, [edge] if edge else [])
        prompt = len(self._before) + made.before.get(edge, 0)
        ids = [*self._before, *made.ids, *self._after]
        decode = self._tokenizer.decode
        lost = {Lost.answer} if bare(row.text) not in bare(decode(ids[prompt:])) else set()
        if bare(row.prompt) not in bare(decode(ids[:prompt])):
            lost.add(Lost.question)
        first = len(self._before) if self._prompt_too else prompt
        return LaidOut(ids, ((first, len(ids)),), frozenset(lost), made.apart)
