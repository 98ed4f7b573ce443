"""Lay out a conversation by the model's chat template: the tokens that the model reads, and which of them are trained.

The whole conversation is tokenised once, and each answer is found in it: the prompt for an answer, rendered by itself,
must be a prefix of the whole. Where it is not, the answer is looked for behind its question. Each row is then checked:
its texts must be whole in the tokens, and every trained answer must end in exactly one end of turn. A row in which an
answer is not found counts as lost.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from lora_lab.dataset.row import Conversation, Role, Turn
from lora_lab.options import TrainOn
from lora_lab.worker.chat_template import ChatTemplate
from lora_lab.worker.laid_out import EndWithin, LaidOut, Lost, bare, holds, spaceless
from lora_lab.worker.tokens import encode, tokens_of

_LONGEST_START = 100
"""Characters of an answer that a prompt may have already."""

_AROUND = 30
"""Characters that a message shows on either side of what it is about."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer's place in the text of its conversation."""

    turn: int
    start: int
    end: int
    """Without the end of the turn."""
    unopened: bool = False


class Conversations:
    """Lays out conversations with one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any, vocab_size: int | None = None, train_on: TrainOn = TrainOn.answers) -> None:
        """Try the template.

        Args:
            vocab_size: ids from here on have no embedding, and are not used as an end of turn; None where unknown.

        Raises: InvalidInput when the template can't lay out a question and its answer.
        """
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._template = ChatTemplate(tokenizer)
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        eos = tokenizer.eos_token_id
        self._eos = eos if eos is not None and (vocab_size is None or eos < vocab_size) else None
        tail = self._template.tail
        self._ends = next((token for token in encode(tokenizer, tail) if token in self._special), None)
        self._ends_in_text = self._ends is None and bool(tail.strip())

    @property
    def end_of_turn(self) -> str:
        """Return the token that ends an answer, or the text where it is not a single token; empty when nothing does."""
        if self._ends is not None:
            return str(self._tokenizer.convert_ids_to_tokens(self._ends))
        if self._ends_in_text:
            return self._template.tail.strip()
        return "" if self._eos is None else str(self._tokenizer.eos_token)

    @property
    def end_is_ours(self) -> bool:
        """Return True where the template ends no turn, so the tokenizer's end of text is added to each answer."""
        return self._ends is None and not self._ends_in_text and self._eos is not None

    def lay_out(self, row: Conversation) -> LaidOut:
        """Lay out one row.

        Raises: InvalidInput when the template raises."""
        row, merged = self._with_system(row)
        chosen = row.answers[-1:] if self._train_on is TrainOn.last_answer else row.answers
        turns, whole, answers = self._places(row, chosen)
        made = tokens_of(self._tokenizer, whole, [each.start for each in answers], [each.end for each in answers])
        edges = [(made.before[each.start], made.before[each.end]) for each in answers]
        ids, spans = self._ended(made.ids, edges)
        laid = LaidOut(ids, tuple(spans), apart=made.apart, merged=merged, unopened=any(a.unopened for a in answers))
        places = [each.turn for each in answers]
        texts = [whole[each.start : each.end] for each in answers]
        read = "".join(_outside(whole, [(each.start, each.end) for each in answers]))
        lost = {
            *_lost(turns, chosen, dict(zip(places, texts, strict=True)), read, spaceless),
            *self._lost_tokens(laid, turns, chosen, places),
        }
        within = self._end_within(turns, chosen) if Lost.end in lost else None
        if within is not None:
            lost = lost - {Lost.end} | {Lost.end_within}
        kept = ((0, len(ids)),) if self._train_on is TrainOn.everything else laid.spans
        return replace(laid, spans=kept, lost=frozenset(lost), end_within=within)

    def _with_system(self, row: Conversation) -> tuple[Conversation, bool]:
        """Put the system prompt at the start of the first question where the template has no place for it, as Gemma 3's
        own template does."""
        system, *rest = row.turns
        if system.role is not Role.system or self._template.has_system:
            return row, False
        first = Turn(Role.user, f"{system.text}\n\n{rest[0].text}")
        return Conversation((first, *rest[1:]), max(0, row.given - 1)), True

    def _places(self, row: Conversation, chosen: list[int]) -> tuple[list[Turn], str, list[_Answer]]:
        """Return the turns as they are trained, their text, and where the chosen answers are in it."""
        turns = [*row.turns]
        template, last = self._template, turns[-1]
        whole, prompt = template.render(turns), template.render(turns[:-1], for_generation=True)
        opening = template.unused.strip()
        if whole.startswith(prompt):
            final = _Answer(len(turns) - 1, len(prompt), self._end_of(whole))
        elif opening and last.text.startswith(opening):
            # R1's prompt opens the reasoning itself: an answer that brings its own goes on from there
            rest = last.text.removeprefix(opening).removeprefix(template.unused[len(template.unused.rstrip()) :])
            turns[-1] = Turn(Role.assistant, rest)
            whole = prompt + rest + template.tail
            final = _Answer(len(turns) - 1, len(prompt), self._end_of(whole))
        elif template.unused and whole.startswith(opened := prompt.removesuffix(template.unused)):
            final = _Answer(len(turns) - 1, len(opened), self._end_of(whole), unopened=bool(opening))
        else:
            # Mistral's template shows the system prompt in a prompt only, so the whole is made from that
            whole = prompt + template.lead + last.text + template.tail
            final = _Answer(len(turns) - 1, len(prompt), self._end_of(whole))
        found: list[_Answer] = []
        for turn in chosen[:-1]:
            place = self._earlier(turns, turn, whole, found[-1].end if found else 0)
            if place is not None and place.end <= final.start:
                found.append(place)
        for each in (*found, final):
            if spaceless(turns[each.turn].text) not in spaceless(whole[each.start : each.end]):
                turns[each.turn] = Turn(Role.assistant, _beyond(whole[: each.start], turns[each.turn].text))
        if self._ends_in_text:  # a marker in plain text is trained, but not the space after it
            marker = template.end.rstrip()
            found = [replace(each, end=each.end + len(marker)) for each in found if whole.startswith(marker, each.end)]
            whole = whole.rstrip()
            final = replace(final, end=len(whole))
        elif self._ends is None:
            whole = whole[: final.end]
        return turns, whole, [*found, final]

    def _end_of(self, whole: str) -> int:
        tail = self._template.tail
        return len(whole) - len(tail) if whole.endswith(tail) else len(whole)

    def _earlier(self, turns: Sequence[Turn], turn: int, whole: str, after: int) -> _Answer | None:
        """Find an answer before the last one; None where it is not in the text as it is in the row."""
        template, text = self._template, turns[turn].text
        prompt = template.render(turns[:turn], for_generation=True)
        opened = prompt.removesuffix(template.unused)
        leads = dict.fromkeys(["", *(joint.lead for joint in template.joints)])
        if whole.startswith(opened):
            unopened = bool(template.unused.strip()) and not whole.startswith(prompt)
            start = len(opened if unopened else prompt)
            for lead in leads:
                if whole.startswith(lead + text, start):
                    return _Answer(turn, start, start + len(lead + text), unopened)
            shown = template.render(turns[: turn + 1]).removesuffix(template.tail)  # trimmed or escaped, perhaps
            return _Answer(turn, start, len(shown), unopened) if whole.startswith(shown) else None
        question = turns[turn - 1].text
        for joint in template.joints:
            at = whole.find(question + joint.opening + joint.lead + text, after)
            if at >= 0:
                start = at + len(question + joint.opening)
                return _Answer(turn, start, start + len(joint.lead + text))
        return None

    def _ended(self, ids: list[int], edges: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Give each answer its end of turn.

        Returns: the ids up to the last one, since what follows is never generated; where the trained ids are."""
        if self._ends is not None:
            spans = []
            limits = [*(start for start, _ in edges[1:]), len(ids)]
            for (start, end), limit in zip(edges, limits, strict=True):
                stop = next((place for place in range(end, limit) if ids[place] in self._special), None)
                spans.append((start, (end if limit < len(ids) else limit) if stop is None else stop + 1))
            return ids[: spans[-1][1]], spans
        if self._ends_in_text or self._eos is None:
            return ids[: edges[-1][1]], edges
        made: list[int] = []
        spans, done = [], 0
        for start, end in edges:
            made += [*ids[done:end], self._eos]
            spans.append((len(made) - 1 - (end - start), len(made)))
            done = end
        return made, spans

    def _end_within(self, turns: Sequence[Turn], chosen: Sequence[int]) -> EndWithin | None:
        """Return the first end of a turn that an answer's own text has."""
        token = self.end_of_turn
        for turn in chosen:
            text = turns[turn].text
            at = text.find(token)
            if at >= 0:
                return EndWithin(token, turn + 1, text[max(0, at - _AROUND) : at + len(token) + _AROUND])
        return None

    def _lost_tokens(
        self, laid: LaidOut, turns: Sequence[Turn], chosen: Sequence[int], places: Sequence[int]
    ) -> Iterator[Lost]:
        """Compare the tokens with the row's own text."""
        decode, spans = self._tokenizer.decode, [laid.ids[start:end] for start, end in laid.spans]
        answers = {place: decode(span) for place, span in zip(places, spans, strict=True)}
        yield from _lost(turns, chosen, answers, decode(laid.read), bare)
        end = self._eos if self.end_is_ours else self._ends
        if end is not None and any(span.count(end) != 1 or span[-1] != end for span in spans):
            yield Lost.end


def _lost(
    turns: Sequence[Turn], chosen: Sequence[int], answers: dict[int, str], read: str, plain: Callable[[str], str]
) -> Iterator[Lost]:
    """Compare a row's turns with what is made of them.

    Args:
        answers: what is trained, by turn.
        plain: removes from a text what may differ.
    """
    if any(plain(turns[turn].text) not in plain(answers.get(turn, "")) for turn in chosen):
        yield Lost.answer
    # templates put a system prompt where they like, and leave the thoughts out of answers before the last
    system = [plain(turn.text) for turn in turns if turn.role is Role.system]
    others = [
        plain(turn.text.rpartition("</think>")[2] if turn.role is Role.assistant else turn.text)
        for place, turn in enumerate(turns)
        if place not in chosen and turn.role is not Role.system
    ]
    seen = plain(read)
    if not holds(seen, others) or not all(text in seen for text in system):
        yield Lost.question


def _beyond(prompt: str, answer: str) -> str:
    """Return an answer without the start that its prompt has already: <think>, where a prompt opens the thoughts."""
    begun = prompt.rstrip()
    longest = 0 if answer[0].isalnum() else min(len(answer) - 1, _LONGEST_START)  # a tag, no part of a word
    return answer[next((size for size in range(longest, 0, -1) if begun.endswith(answer[:size])), 0) :]


def _outside(text: str, spans: list[tuple[int, int]]) -> list[str]:
    edges = [0, *(place for span in spans for place in span), len(text)]
    return [text[start:end] for start, end in [*pairwise(edges)][::2]]
