"""Write answers greedily, with what was trained and without: a trial's to held-out prompts, and those to a user."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig

from lora_lab.config import TrialConfig
from lora_lab.dataset.row import Role, Turn
from lora_lab.options import TrainOn, Weights
from lora_lab.worker.chat_template import ChatTemplate
from lora_lab.worker.conversation import Conversations
from lora_lab.worker.data import IGNORED, Example
from lora_lab.worker.evaluation import evaluating
from lora_lab.worker.examples import pad_id
from lora_lab.worker.prompts import prompt_text
from lora_lab.worker.shards import shards_of
from lora_lab.worker.tokenizer_files import load_tokenizer
from lora_lab.worker.trainables.start import before_training
from lora_lab.worker.trainables.trainable import base_of
from lora_lab.worker.trained import be_quiet, load_trained, load_untrained, on_its_weights, this_device

MOST_TOKENS = 128
"""Of an answer."""

_DEFAULT = 8
"""Prompts in a job."""

_AT_ONCE = 8
"""Prompts in a batch, at least."""

_TRAINED_TOKENS = 2
"""A batch's tokens over those of a training step, at most. A token's cache is small next to what training keeps."""

_SHORTEST_PROMPT = 2
"""Tokens. A single one is what some tokenizers put before every text."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and of a held-out row the answer that follows."""

    prompt: list[int]
    gold: list[int]
    """With the end of the turn."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote."""

    ids: list[int]
    """Without the token that ended the turn."""
    ended: bool
    """Whether the model ended its turn, rather than reach the most tokens."""


def answers_asked(config: TrialConfig) -> int:
    """Return how many prompts are answered."""
    asked = config.measure.answers
    return (_DEFAULT if config.train.is_job else 0) if asked is None else asked


def questions(rows: Sequence[Example], count: int) -> list[Question]:
    """Return the first `count` rows that are whole and have a prompt.

    Of several answers in a row the last one is asked for, with everything before it as the prompt."""
    return list(islice((asked for row in rows if (asked := _question(row)) is not None), count))


def why_no_question(config: TrialConfig) -> str:
    """Say why no held-out row gives a question."""
    if config.data.train_on is TrainOn.everything:
        return (
            "with data.train_on=everything no held-out prompt is answered, because no row has a prompt that is only "
            "read. Use data.train_on=answers, or measure.answers=0"
        )
    return f"no held-out row has a prompt and is whole within seq_len={config.seq_len}: none is answered"


def _question(row: Example) -> Question | None:
    start = len(row.labels)
    while start > 0 and row.labels[start - 1] != IGNORED:
        start -= 1
    if row.truncated or start < _SHORTEST_PROMPT or start == len(row.ids):
        return None
    return Question(row.ids[:start], row.ids[start:])


class Writer:
    """Writes answers with a trained model, and with what it was before."""

    def __init__(self, model: Any, tokenizer: Any, config: TrialConfig, pad_id: int, end_of_turn: str) -> None:
        """Take the live model.

        Args:
            end_of_turn: what ends an answer in the training rows; empty where nothing does.
        """
        self._model = model
        self._config = config
        self._untrained: Any = None
        """The model before its training, where that is not within the trained one; None until it is asked."""
        self._tokenizer = tokenizer
        self._attention = config.attention.value
        self._precision = config.precision.dtype
        self._tokens_at_once = _TRAINED_TOKENS * config.batch_size * config.seq_len
        self._pad_id = pad_id
        single = tokenizer.get_vocab().get(end_of_turn)
        # shapes without weights have the default ids of their kind, which mean nothing here
        own = config.model.weights is Weights.pretrained
        stops = _listed(base_of(model).generation_config.eos_token_id) if own else []
        self._ends = {single, tokenizer.eos_token_id, *stops} - {None}
        self._end_text = end_of_turn if single is None else ""

    def write(
        self,
        asked: Sequence[Question],
        most_tokens: int,
        tuned: bool,
        progress: Callable[[int], None],
        clock: "Clock | None" = None,
    ) -> list[Answer]:
        """Answer every question.

        Args:
            most_tokens: of an answer, with its end.
            tuned: False asks the model as it was before.
            progress: gets the number of answers so far.
            clock: notes when tokens come.
        """
        found: list[Answer] = []
        model, without = (self._model, contextlib.nullcontext()) if tuned else self._before()
        at_once = max(_AT_ONCE, self._tokens_at_once // (max(len(each.prompt) for each in asked) + most_tokens))
        with (
            without,
            _as_transformers_has_it(base_of(model), self._attention),
            evaluating(model, self._precision, model.device),
        ):
            for start in range(0, len(asked), at_once):
                found += self._batch(model, asked[start : start + at_once], most_tokens, clock)
                progress(len(found))
        return found

    def _before(self) -> tuple[Any, contextlib.AbstractContextManager[None]]:
        """Return the model before its training, and the context that makes it so. Where every weight was trained, it is
        loaded once more, next to the trained one."""
        if hasattr(self._model, "disable_adapter"):
            return self._model, before_training(self._model)
        if self._untrained is None:
            self._untrained = load_untrained(self._config, self._model.device)
        return self._untrained, contextlib.nullcontext()

    def _batch(self, model: Any, asked: Sequence[Question], most_tokens: int, clock: "Clock | None") -> list[Answer]:
        width = max(len(each.prompt) for each in asked)
        ids = torch.full((len(asked), width), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(asked):  # padded on the left: the answers follow on the right
            ids[row, width - len(each.prompt) :] = torch.tensor(each.prompt)
            mask[row, width - len(each.prompt) :] = 1
        device = model.device
        written: Tensor = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self._greedy(most_tokens),
            tokenizer=self._tokenizer,
            streamer=clock,
            # an answer that rounding ends earlier on one worker must not leave the others alone at a layer
            synced_gpus=shards_of(self._model) is not None,
        )
        return [self._answer(row[width:].tolist()) for row in written]

    def _greedy(self, most_tokens: int) -> GenerationConfig:
        """Return settings that take nothing from those that came with the model, such as its repetition penalty."""
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=most_tokens,
            eos_token_id=sorted(self._ends) or None,
            stop_strings=[self._end_text] if self._end_text else None,
            pad_token_id=self._pad_id,
            use_cache=True,
        )

    def _answer(self, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        if end is not None:
            return Answer(ids[:end], ended=True)
        ended = bool(self._end_text) and self._end_text in self._tokenizer.decode(ids)
        return Answer(ids, ended)

    def text(self, ids: list[int]) -> str:
        """Return an answer's text, without the end of the turn."""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return (text.split(self._end_text)[0] if self._end_text else text).strip()


def most_tokens(architecture: Any, asked: Sequence[Question]) -> int:
    """Return how many tokens an answer may have: MOST_TOKENS, or what the model's positions leave after the longest
    prompt."""
    positions = _positions(architecture)
    longest = max(len(each.prompt) for each in asked)
    return MOST_TOKENS if positions is None else max(1, min(MOST_TOKENS, positions - longest))


def _positions(architecture: Any) -> int | None:
    return getattr(architecture.get_text_config(), "max_position_embeddings", None)


@contextlib.contextmanager
def _as_transformers_has_it(causal: Any, attention: str) -> Iterator[None]:
    """Take back what an engine has changed for training. Rows that are padded on the left need a mask, which an engine
    may leave out; and a forward of our own does not show which arguments it takes."""
    forward, before = causal.__dict__.pop("forward", None), causal.config._attn_implementation
    causal.set_attn_implementation(attention)
    try:
        yield
    finally:
        causal.set_attn_implementation(before)
        if forward is not None:
            causal.forward = forward


def _listed(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


class Clock:
    """Notes when tokens come; generate calls it with the prompt first, then with each token on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        """Note the time."""
        self.times.append(time.monotonic())

    def end(self) -> None:
        """Do nothing at the end."""


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """An answer to a user, and how long it took."""

    text: str
    ids: list[int]
    """Without the token that ended the turn."""
    ended: bool
    tokens: int
    """With the end of the turn."""
    first_token_seconds: float
    """From the prompt on."""
    rest_seconds: float
    """From the first token to the last."""

    @property
    def tokens_per_second(self) -> float | None:
        """Return the rate after the first token; None where there is no second one."""
        return (self.tokens - 1) / self.rest_seconds if self.rest_seconds > 0 else None


class Answerer:
    """A trial's model, loaded again, which answers a user as it was trained or as it was before."""

    def __init__(self, config: TrialConfig, trained: Path, as_conversations: bool) -> None:
        """Load the model as the trial had it.

        Args:
            trained: the folder `adapter` or `model`.
            as_conversations: whether a chat template, where the model has one, lays the questions out.

        Raises: InvalidInput."""
        be_quiet()
        config, _ = on_its_weights(config, trained)
        self._model = load_trained(config, trained, this_device())
        self._tokenizer = load_tokenizer(config.model)
        has_template = as_conversations and self._tokenizer.chat_template is not None
        self._template = ChatTemplate(self._tokenizer) if has_template else None
        self._most_positions = _positions(self._model.config)
        words = self._model.config.get_text_config().vocab_size
        end_of_turn = Conversations(self._tokenizer, words).end_of_turn if has_template else ""
        self._writer = Writer(self._model, self._tokenizer, config, pad_id(self._tokenizer, words), end_of_turn)
        # the first call of all pays for what is set up once, and would make the model that answers first look slow
        self.answer([Turn(Role.user, ".")], tuned=True, most_tokens=2)

    @property
    def has_template(self) -> bool:
        """Return whether questions are laid out by a chat template. Otherwise they go in as they are."""
        return self._template is not None

    def answer(self, turns: Sequence[Turn], tuned: bool, most_tokens: int) -> TimedAnswer:
        """Answer the last turn."""
        asked, clock, begun = Question(self._ids(turns), []), Clock(), time.monotonic()
        [found] = self._writer.write([asked], most_tokens, tuned, lambda _: None, clock)
        _, first, *later = clock.times
        return TimedAnswer(
            text=self._writer.text(found.ids),
            ids=found.ids,
            ended=found.ended,
            tokens=1 + len(later),
            first_token_seconds=first - begun,
            rest_seconds=later[-1] - first if later else 0.0,
        )

    def room(self, turns: Sequence[Turn]) -> int | None:
        """Return how many tokens fit after the turns; None where the model states no limit."""
        return None if self._most_positions is None else self._most_positions - len(self._ids(turns))

    def memory(self) -> tuple[float, str]:
        """Return the memory used in GiB, and what it is."""
        if self._model.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._model.device) / 2**30, "of the card, at most"
        return psutil.Process().memory_info().rss / 2**30, "resident"

    def _ids(self, turns: Sequence[Turn]) -> list[int]:
        # a template brings its own special tokens
        ids: list[int] = self._tokenizer(prompt_text(self._template, turns), add_special_tokens=not self.has_template)[
            "input_ids"
        ]
        return ids
