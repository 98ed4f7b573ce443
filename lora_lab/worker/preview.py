"""Look at rows as the model would read them. The imports at the top need no torch: the parent has them too."""

import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lora_lab.config import TrialConfig
from lora_lab.events import DataCounted
from lora_lab.options import Batching

if TYPE_CHECKING:
    from lora_lab.worker.data import Example

SHOWN_ROWS = 3
MOST_ESTIMATED = 5000
"""Rows from which padding, packing and scripts are estimated."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens in a row that are all trained, or all only read."""

    text: str
    trained: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One row to train on, up to seq_len."""

    pieces: list[Piece]
    cut: bool
    """Whether it goes on beyond seq_len."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What a trial would train on."""

    rows: list[ShownRow]
    """The first ones."""
    counted: DataCounted
    warnings: list[str]
    padded: dict[str, float]
    """Share of the token slots that is padding, by data.batching."""
    scripts: dict[str, float]
    """Share of the letters of what is trained, by script, the largest first."""
    estimated_from: int
    """Rows that the shares were estimated from."""


def preview(config: TrialConfig) -> Preview:
    """Read and tokenise the rows as the trial would. No weights are loaded, and no device is used.

    Raises: InvalidInput."""
    from lora_lab.worker.check import checked_examples
    from lora_lab.worker.data import pack
    from lora_lab.worker.models import load_architecture
    from lora_lab.worker.stages.data_loading import counted, warnings_of
    from lora_lab.worker.tokenizer_files import load_tokenizer

    unpacked = replace(config, data=replace(config.data, batching=Batching.longest))
    examples, _ = checked_examples(unpacked, load_architecture(config.model))
    tokenizer = load_tokenizer(config.model)
    places = [*range(len(examples.train))]
    random.Random(config.seed).shuffle(places)
    some = [examples.train[place] for place in places[:MOST_ESTIMATED]]
    longest = _batches(some, config.batch_size)
    real = sum(len(example.ids) for example in some)
    return Preview(
        rows=[ShownRow(_pieces(each, tokenizer), each.truncated) for each in examples.train[:SHOWN_ROWS]],
        counted=counted(examples, config.seq_len),
        warnings=warnings_of(config, examples),
        padded={
            Batching.longest.name: 1 - real / sum(longest),
            Batching.seq_len.name: 1 - real / (len(some) * config.seq_len),
            Batching.packed.name: 1 - real / (len(pack(some, config.seq_len)) * config.seq_len),
        },
        scripts=_scripts(_answers(example, tokenizer) for example in some),
        estimated_from=len(some),
    )


def _batches(examples: "Sequence[Example]", batch_size: int) -> list[int]:
    """Return the token slots of each micro-batch when it is as wide as its longest row."""
    starts = range(0, len(examples), batch_size)
    batches = (examples[start : start + batch_size] for start in starts)
    return [len(batch) * max(len(example.ids) for example in batch) for batch in batches]


def _pieces(example: "Example", tokenizer: Any) -> list[Piece]:
    from lora_lab.worker.data import IGNORED

    labelled = zip(example.ids, example.labels, strict=True)
    pieces = []
    for trained, group in groupby(labelled, key=lambda each: each[1] != IGNORED):
        ids = [token for token, _ in group]
        pieces.append(Piece(tokenizer.decode(ids), trained, len(ids)))
    return pieces


def _answers(example: "Example", tokenizer: Any) -> str:
    """Return the text that is trained, without the marks of a chat template."""
    trained = [label for label in example.labels if label >= 0]
    text: str = tokenizer.decode(trained, skip_special_tokens=True)
    return text


def _scripts(texts: Iterable[str]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_script(letter) for letter in text if letter.isalpha())
    return {script: count / counts.total() for script, count in counts.most_common()}


@cache
def _script(letter: str) -> str:
    """Return the first word of a letter's Unicode name, which is its script for all but a few."""
    return unicodedata.name(letter, "unnamed").partition(" ")[0].capitalize()
