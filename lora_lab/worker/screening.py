"""Find rows that the model knows already: their perplexity before training is low."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_lab.options import DType
from lora_lab.worker.data import Collator, Example
from lora_lab.worker.evaluation import evaluating, losses_of_batch


@dataclass(frozen=True, slots=True)
class Screened:
    """Rows by their perplexity."""

    kept: list[Example]
    dropped: list[Example]
    median: float
    """Half of all rows have this perplexity or less."""

    def sentence(self, least: float) -> str:
        """Say what was dropped, and whether it was the short rows."""
        count = len(self.kept) + len(self.dropped)
        said = f"data.min_perplexity={least:g} left out {len(self.dropped)} of {count} rows to train on"
        tokens = [statistics.median(each.trained for each in rows) for rows in (self.dropped, self.kept) if rows]
        if len(tokens) == 2:
            said += f" (median of their trained tokens {tokens[0]:g}, of the others' {tokens[1]:g})"
        return f"{said}; the median perplexity of all is {self.median:.3g}"


def screen(examples: Sequence[Example], losses: Sequence[float], least: float) -> Screened:
    """Separate the rows whose perplexity is below `least`.

    Args:
        losses: nats per trained token of each row. Its exponential is the perplexity, so that the length of a row does
            not enter."""
    known = [loss < math.log(least) for loss in losses]
    return Screened(
        kept=[example for example, low in zip(examples, known, strict=True) if not low],
        dropped=[example for example, low in zip(examples, known, strict=True) if low],
        median=math.exp(statistics.median(losses)),
    )


def row_losses(
    model: Any,
    examples: Sequence[Example],
    most_tokens: int,
    pad_id: int,
    precision: DType,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> list[float]:
    """Return the mean loss in nats per trained token of each row.

    Args:
        most_tokens: the token slots of one batch, where a single row has no more."""
    collator, losses = Collator(pad_id=pad_id), [0.0] * len(examples)
    done = 0
    with evaluating(model, precision, device):
        for places in _batches(examples, most_tokens):
            batch = collator([examples[place] for place in places])
            tensors = {name: part.to(device) for name, part in batch.items() if isinstance(part, torch.Tensor)}
            for place, nats in zip(places, losses_of_batch(model, tensors).tolist(), strict=True):
                losses[place] = nats / examples[place].trained
            done += len(places)
            progress(done, len(examples))
    return losses


def _batches(examples: Sequence[Example], most_tokens: int) -> Iterator[list[int]]:
    """Yield the places of rows of like length, as many as fit."""
    places: list[int] = []
    for place in sorted(range(len(examples)), key=lambda place: -len(examples[place].ids)):
        if places and (len(places) + 1) * len(examples[places[0]].ids) > most_tokens:
            yield places
            places = []
        places.append(place)
    if places:
        yield places
