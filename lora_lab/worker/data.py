"""Make batches of token ids out of rows, with every token counted."""

from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Generic, TypeVar, overload

import torch
from torch import Tensor

from lora_lab.config import TrialConfig
from lora_lab.options import Batching, EngineKind
from lora_lab.worker.example import IGNORED as IGNORED
from lora_lab.worker.example import Example as Example
from lora_lab.worker.token_rows import TokenRows

_ALIGNED = 64
"""Row widths are multiples of this many tokens, which suits kernels."""


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


_Rows = TypeVar("_Rows", bound=Sequence[Example])


class Packed(Sequence[Example], Generic[_Rows]):
    """Rows of several documents each, joined when they are asked for."""

    def __init__(self, documents: _Rows, rows: list[list[int]]) -> None:
        """Take the documents, and which of them each row has."""
        self.documents = documents
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        return _joined([self.documents[number] for number in self.rows[place]])


def sizes_of(rows: Sequence[Example]) -> list[int]:
    """Return the tokens of each row."""
    if isinstance(rows, TokenRows):
        sizes: list[int] = rows.sizes.tolist()
        return sizes
    if isinstance(rows, Packed):
        documents = sizes_of(rows.documents)
        return [sum(documents[number] for number in row) for row in rows.rows]
    return [len(row.ids) for row in rows]


def pack(examples: _Rows, seq_len: int) -> Packed[_Rows]:
    """Lay documents end to end into rows of at most `seq_len` tokens, each into the first row with room.

    A document's first label is never predicted from the document before it.
    """
    sizes = sizes_of(examples)
    # a tree of the most room in any row below a node, so that a million documents take seconds
    leaves = 1 << max(0, len(sizes) - 1).bit_length()
    room = array("q", [seq_len]) * (2 * leaves)
    rows: list[list[int]] = []
    for place, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < size
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(place)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return Packed(examples, rows)


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
            trained=int((labels[:, 1:] != IGNORED).sum()),
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
