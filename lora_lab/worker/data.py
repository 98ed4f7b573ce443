"""Turn rows of text into batches of token ids, with every token counted."""

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.data_config import DataConfig
from lora_lab.dataset.row import Passage, Row, kinds_of
from lora_lab.dataset.selection import Selected, check_left, select
from lora_lab.dataset.sources import file_rows
from lora_lab.dataset.split import check_row_count, split_rows
from lora_lab.options import Batching, DataSource, EngineKind, TrainOn
from lora_lab.worker.hub_rows import hub_rows
from lora_lab.worker.laid_out import LaidOut, Losses
from lora_lab.worker.layouts import Layouts

IGNORED = -100
"""The label that torch's cross entropy leaves out."""

_ALIGNED = 64
"""Row widths are multiples of this many tokens, which suits kernels."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. `labels` are the ids that are predicted and IGNORED elsewhere; both have
    the same length. `starts` are the positions where a document begins (several when packed)."""

    ids: list[int]
    labels: list[int]
    truncated: bool = False
    starts: tuple[int, ...] = (0,)

    @property
    def trained(self) -> int:
        """Count the labels that are predicted: the first position never is."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def document_lengths(self) -> list[int]:
        """Return the tokens of each document in the row."""
        return [end - start for start, end in pairwise([*self.starts, len(self.ids)])]


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Counts of one micro-batch. They travel inside the batch, so that they can't belong to another step."""

    rows: int = 0
    slots: int = 0
    real: int = 0
    trained: int = 0
    attended: int = 0
    """Sum of the squares of the documents' lengths in tokens: attention is calculated within a document."""
    attended_slots: int = 0
    """Sum of the squares of the rows' lengths in slots."""

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Examples:
    """The tokenised data set of one trial."""

    train: list[Example]
    heldout: list[Example]
    rows_read: int
    rows_truncated: int
    rows_without_labels: int
    rows_repeated: int
    rows_heldout_prompt_trained: int
    rows_near_repeated: int | None = None
    """Rows that nearly equal an earlier one; None where that was not looked for."""
    rows_dropped: int = 0
    """Rows that are not used because they equal an earlier one, or nearly so."""
    rows_in_both: int = 0
    """Rows that are not trained on because the file of held-out rows has them."""
    rows_low_perplexity: int = 0
    """Rows that data.min_perplexity left out."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of every row before it was cut; empty for random tokens."""
    rows_lost: int = 0
    """Rows whose text is not whole in the tokens, or in which an answer does not end in one end of turn."""
    rows_apart: int = 0
    """Rows whose parts had to be tokenised separately."""
    end_of_turn: str = ""
    """What ends each answer; empty where nothing does, and for random tokens."""
    kinds: str = ""
    """Whether the rows are conversations, passages or both; empty for random tokens."""
    remarks: list[str] = field(default_factory=list)
    """What the user should know of how the rows were laid out."""

    @property
    def digest(self) -> str:
        """Return the sha256 over every example's ids and labels, in order."""
        sha = hashlib.sha256()
        for example in [*self.train, *self.heldout]:
            sha.update(repr((example.ids, example.labels)).encode())
        return sha.hexdigest()


def load_examples(config: TrialConfig, tokenizer: Any, vocab_size: int) -> Examples:
    """Read the rows the config names, tokenise, hold out, and pack if asked to.

    Raises: InvalidInput when there are too few usable rows or the rows could not be loaded.
    """
    if config.data.source is DataSource.random_tokens:
        made = _random_examples(config.data.rows or 0, config.seq_len, vocab_size, config.seed)
        chosen = Selected(rows=[Passage(prompt="", text=str(number)) for number in range(len(made))])  # none are equal
        rows, empty = chosen.rows, 0
        lengths = list[int]()
        losses, end_of_turn, kinds, remarks = Losses(), "", "", list[str]()
    else:
        read, empty, remarks = _read_rows(config.data)
        chosen = select(config.data, read)
        rows = [*chosen.rows, *chosen.heldout]
        layouts = Layouts(tokenizer, vocab_size, config.data.train_on)
        laid, losses = _lay_out(rows, layouts)
        lengths = [len(each.ids) for each in laid]
        made = [_example(each, config.seq_len) for each in laid]
        end_of_turn, kinds = layouts.end_of_turn, kinds_of(rows)
        remarks = [*remarks, *chosen.remarks, *layouts.remarks(losses)]
    usable = [example for example in made if example.trained > 0]
    usable_rows = [row for row, example in zip(rows, made, strict=True) if example.trained > 0]
    if not usable:
        raise InvalidInput(
            f"at seq_len={config.seq_len} no row has a token left to train on: every prompt alone is longer. "
            "Raise seq_len."
        )
    per_step = config.batch_size * config.grad_accum_steps
    needed = 1 if config.data.batching is Batching.packed else per_step
    which = f"rows with something to train on at seq_len={config.seq_len}"
    own = sum(example.trained > 0 for example in made[len(chosen.rows) :])
    if chosen.heldout:
        check_left(len(usable) - own, own, needed, which)
    else:
        check_row_count(len(usable), config.data.holdout, needed, which)
    split = split_rows(usable_rows, config.data.holdout, own)
    held = set(split.held)
    train = [example for i, example in enumerate(usable) if i not in held]
    return Examples(
        train=packed_rows(config, train) if config.data.min_perplexity is None else train,
        heldout=[usable[i] for i in split.held],
        rows_read=len(made) + empty + chosen.dropped + chosen.in_both,
        rows_truncated=sum(example.truncated for example in made),
        rows_without_labels=len(made) - len(usable) + empty,
        rows_lost=losses.lost,
        rows_apart=losses.apart,
        end_of_turn=end_of_turn,
        kinds=kinds,
        remarks=remarks,
        rows_repeated=chosen.repeated,
        rows_near_repeated=chosen.near_repeated,
        rows_dropped=chosen.dropped,
        rows_in_both=chosen.in_both,
        rows_heldout_prompt_trained=split.prompts_trained,
        lengths=lengths,
    )


def packed_rows(config: TrialConfig, train: list[Example]) -> list[Example]:
    """Pack rows if data.batching asks for that.

    Raises: InvalidInput when the packed ones do not fill one optimizer step."""
    if config.data.batching is not Batching.packed:
        return train
    packed = pack(train, config.seq_len)
    check_filled(config, len(packed), f"rows when packed to seq_len={config.seq_len}")
    return packed


def check_filled(config: TrialConfig, count: int, which: str) -> None:
    """Raise InvalidInput unless `count` rows fill one optimizer step."""
    needed = config.batch_size * config.grad_accum_steps
    if count < needed:
        raise InvalidInput(
            f"the data has {count} {which}, but one step needs {needed} (batch_size x grad_accum_steps). Use more rows "
            "or a smaller batch_size."
        )


def _read_rows(data: DataConfig) -> tuple[list[Row], int, list[str]]:
    """Return the rows, how many of a hub's data set had an empty answer (alpaca has some), and what the user should
    know."""
    if data.source is DataSource.hub:
        return *hub_rows(data), []
    found = file_rows(data)
    return found.rows, 0, found.remarks


def tokenize(row: Row, tokenizer: Any, seq_len: int, train_on: TrainOn = TrainOn.answers) -> Example:
    """Turn one row into tokens, of which the answers and their ends of turn are trained.

    Raises: InvalidInput when the model's chat template can't lay it out."""
    return _example(Layouts(tokenizer, None, train_on).lay_out(row), seq_len)


def _example(laid: LaidOut, seq_len: int) -> Example:
    labels = [IGNORED] * len(laid.ids)
    for start, end in laid.spans:
        labels[start:end] = laid.ids[start:end]
    return Example(laid.ids[:seq_len], labels[:seq_len], truncated=len(laid.ids) > seq_len)


def _lay_out(rows: list[Row], layouts: Layouts) -> tuple[list[LaidOut], Losses]:
    """Lay out every row.

    Raises: InvalidInput when most rows lose text or their end of turn."""
    made, losses = [], Losses()
    for row in rows:
        made.append(layouts.lay_out(row))
        losses.count(row, made[-1], layouts.tokenizer)
    if losses.lost * 2 > losses.rows:
        raise InvalidInput(
            *losses.sentences(),
            "The model would not be trained on your rows. Change the rows, change chat_template in the model's folder, "
            "or use another model.",
            *layouts.remedies(rows),
        )
    return made, losses


def check_token_ids(examples: Examples, tokenizer: Any, vocab_size: int) -> None:
    """Raise InvalidInput for a token that has no embedding: on a GPU it would cost the worker."""
    every = (token for example in (*examples.train, *examples.heldout) for token in example.ids)
    beyond = next((token for token in every if token >= vocab_size), None)
    if beyond is not None:
        raise InvalidInput(
            f"the rows hold the token {tokenizer.convert_ids_to_tokens(beyond)!r}, whose id is {beyond}: the tokenizer "
            f"knows {len(tokenizer)} tokens, the model {vocab_size}. Use the tokenizer that belongs to the model."
        )


def pad_id(tokenizer: Any, vocab_size: int) -> int:
    """Return an id to pad rows with. Padding is masked, so any id with an embedding will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None and token < vocab_size), 0)


def _random_examples(count: int, seq_len: int, vocab_size: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (count, seq_len), generator=generator).tolist()
    return [Example(row, [IGNORED, *row[1:]]) for row in ids]


def pack(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """Lay documents end to end into rows of at most `seq_len` tokens, each into the first row with room.

    A document's first label is never predicted from the document before it.
    """
    bins: list[list[Example]] = []
    free: list[int] = []
    for example in examples:
        need = len(example.ids)
        place = next((i for i, room in enumerate(free) if room >= need), None)
        if place is None:
            bins.append([example])
            free.append(seq_len - need)
        else:
            bins[place].append(example)
            free[place] -= need
    return [_joined(documents) for documents in bins]


def _joined(documents: Sequence[Example]) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for document in documents:
        starts.append(len(ids))
        ids += document.ids
        labels += [IGNORED, *document.labels[1:]]
    return Example(ids, labels, any(d.truncated for d in documents), tuple(starts))


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes one micro-batch of shape (rows, width) out of examples, padded on the right.

    `widths` are the widths to choose from, ascending; without any, a batch is as wide as its longest row.

    A packed batch has position_ids that start again with every document, and no attention mask: transformers then
    builds a mask in which documents don't see each other.
    """

    pad_id: int
    widths: tuple[int, ...] = ()
    packed: bool = False

    def width_of(self, examples: Sequence[Example]) -> int:
        """Return the width of a batch of these."""
        longest = max(len(example.ids) for example in examples)
        return next((width for width in self.widths if width >= longest), longest)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor | TokenCounts]:
        """Make the batch for the model, with its TokenCounts under `counts`."""
        width = self.width_of(examples)
        ids = torch.full((len(examples), width), self.pad_id)
        labels = torch.full((len(examples), width), IGNORED)
        mask = torch.zeros((len(examples), width), dtype=torch.long)
        for row, example in enumerate(examples):
            length = len(example.ids)
            ids[row, :length] = torch.tensor(example.ids)
            labels[row, :length] = torch.tensor(example.labels)
            mask[row, :length] = 1
        counts = TokenCounts(
            rows=len(examples),
            slots=len(examples) * width,
            real=sum(len(example.ids) for example in examples),
            trained=sum(example.trained for example in examples),
            attended=sum(length * length for example in examples for length in example.document_lengths),
            attended_slots=len(examples) * width * width,
        )
        batch: dict[str, Tensor | TokenCounts] = {"input_ids": ids, "labels": labels, "counts": counts}
        if self.packed:
            batch["position_ids"] = torch.tensor([_positions(example, width) for example in examples])
        else:
            batch["attention_mask"] = mask
        return batch


def _positions(example: Example, width: int) -> list[int]:
    """Count positions from the start of each document; the padding is one more document."""
    edges = [*example.starts, len(example.ids), width]
    return [i for start, end in pairwise(edges) for i in range(end - start)]


def train_collator(config: TrialConfig, pad_id: int) -> Collator:
    """Return the collator for `data.batching` and the engine."""
    packed = config.data.batching is Batching.packed
    return Collator(pad_id=pad_id, widths=row_widths(config), packed=packed)


def row_widths(config: TrialConfig) -> tuple[int, ...]:
    """Return the widths in tokens that batches are padded to, ascending; none to pad to the longest row."""
    if config.data.batching is not Batching.longest:
        return (config.seq_len,)
    if config.engine.kind not in (EngineKind.compile, EngineKind.graph):
        return ()
    count = config.engine.lengths
    even = (-(-config.seq_len * i // count) for i in range(1, count + 1))
    return tuple(sorted({min(config.seq_len, -(-width // _ALIGNED) * _ALIGNED) for width in even}))
