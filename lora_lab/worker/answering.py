"""Answer questions with the base model and the tuned one, and measure how fast."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lora_lab.config import TrialConfig
from lora_lab.dataset.row import Role, Turn
from lora_lab.options import Layout
from lora_lab.worker.adapted import be_quiet, load_adapted, this_device
from lora_lab.worker.chat_template import ChatTemplate
from lora_lab.worker.conversation import Conversations
from lora_lab.worker.examples import pad_id
from lora_lab.worker.models import load_tokenizer, working_dtype
from lora_lab.worker.prompts import prompt_text


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer, and how long it took."""

    text: str
    ids: list[int]
    first_token_seconds: float
    seconds: float
    """From the prompt to the last token."""
    ended: bool
    """Whether the model ended its turn, rather than reach the most tokens."""

    @property
    def tokens(self) -> int:
        """Return how many tokens it has, the end of the turn included."""
        return len(self.ids)

    @property
    def tokens_per_second(self) -> float | None:
        """Return the rate after the first token; None where there is no second one."""
        rest = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else None


class _Clock:
    """Notes when tokens come; generate calls it with the prompt first, then with each token on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.monotonic())

    def end(self) -> None:
        pass


class Answerer:
    """One loaded model that answers with its adapter or without."""

    def __init__(self, config: TrialConfig, adapter: Path) -> None:
        """Load the model as the trial had it.

        Raises: InvalidInput."""
        be_quiet()
        self._device = this_device()
        self._model = load_adapted(config, adapter, self._device)
        self._dtype = working_dtype(config.precision.dtype, self._device)
        self._tokenizer = load_tokenizer(config.model)
        if config.data.layout in (Layout.completion, Layout.text):
            self._tokenizer.chat_template = None  # it was trained without
        self._template = None if self._tokenizer.chat_template is None else ChatTemplate(self._tokenizer)
        shapes = self._model.config.get_text_config()
        self._most_positions: int | None = getattr(shapes, "max_position_embeddings", None)
        self._pad = pad_id(self._tokenizer, shapes.vocab_size)
        self._stop = self._stops(shapes.vocab_size)
        # the first call of all pays for what is set up once, and would make the model that answers first look slow
        self.answer([Turn(Role.user, ".")], tuned=True, most_tokens=2)

    @property
    def has_template(self) -> bool:
        """Return whether questions are laid out by a chat template. Otherwise they go in as they are."""
        return self._template is not None

    def answer(self, turns: Sequence[Turn], tuned: bool, most_tokens: int) -> Answer:
        """Answer the last turn, always with the likeliest token."""
        text = prompt_text(self._template, turns)
        # a template brings its own special tokens
        read = self._tokenizer(text, add_special_tokens=not self.has_template, return_tensors="pt")
        ids = read["input_ids"].to(self._device)
        clock = _Clock()
        lower = self._dtype is not torch.float32
        adapter = nullcontext() if tuned else self._model.disable_adapter()
        with torch.no_grad(), torch.autocast(self._device.type, self._dtype, enabled=lower), adapter:
            begun = time.monotonic()
            made = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                # the model's own generation_config may set these, which only sampling uses
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=most_tokens,
                pad_token_id=self._pad,
                use_cache=True,
                streamer=clock,
                **self._stop,
            )
        new = made[0, ids.shape[1] :].tolist()
        return Answer(
            text=self._tokenizer.decode(new, skip_special_tokens=True).strip(),
            ids=new,
            first_token_seconds=clock.times[1] - begun,
            seconds=clock.times[-1] - begun,
            ended=len(new) < most_tokens or new[-1] in self._stop["eos_token_id"],
        )

    def room(self, turns: Sequence[Turn]) -> int | None:
        """Return how many tokens fit after the turns; None where the model states no limit."""
        ids = self._tokenizer(prompt_text(self._template, turns), add_special_tokens=False)["input_ids"]
        return None if self._most_positions is None else self._most_positions - len(ids)

    def memory(self) -> tuple[float, str]:
        """Return the memory used in GiB, and what it is."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / 2**30, "of the card, at most"
        return psutil.Process().memory_info().rss / 2**30, "resident"

    def _stops(self, vocab_size: int) -> dict[str, Any]:
        """Return what ends an answer: the model's own ends of text, and the end of turn that was trained."""
        ends = self._model.generation_config.eos_token_id
        ids = {*([] if ends is None else [ends] if isinstance(ends, int) else ends)}
        if self._tokenizer.eos_token_id is not None:
            ids.add(self._tokenizer.eos_token_id)
        turn = Conversations(self._tokenizer, vocab_size).end_of_turn if self.has_template else ""
        known = self._tokenizer.convert_tokens_to_ids(turn) if turn else None
        if known is not None and known != self._tokenizer.unk_token_id:
            return {"eos_token_id": sorted({*ids, known})}
        text = {"stop_strings": [turn], "tokenizer": self._tokenizer} if turn else {}
        return {"eos_token_id": sorted(ids), **text}
