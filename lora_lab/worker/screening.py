"""Find rows that the model knows already: their perplexity before training is low."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_lab.files import read_json, write_json
from lora_lab.options import DType
from lora_lab.worker.data import Collator, Example, sizes_of
from lora_lab.worker.evaluation import evaluating, losses_of_batch

SCREENED = "screened.json"
"""The file in a trial's folder that has what the screening found, for a job that is resumed."""


@dataclass(frozen=True, slots=True)
class Screened:
    """Rows by their perplexity."""

    rows: int
    dropped: list[int]
    """The places of the rows that are left out, ascending."""
    median: float
    """Half of all rows have this perplexity or less."""
    tokens: list[float]
    """The median of the trained tokens of the rows that are left out, and of the others; empty without one of them."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Return for each row whether it stays."""
        kept = np.ones(self.rows, bool)
        kept[self.dropped] = False
        return kept

    def sentence(self, least: float) -> str:
        """Say what was dropped, and whether it was the short rows."""
        said = f"data.min_perplexity={least:g} left out {len(self.dropped)} of {self.rows} rows to train on"
        if self.tokens:
            said += f" (median of their trained tokens {self.tokens[0]:g}, of the others' {self.tokens[1]:g})"
        return f"{said}; the median perplexity of all is {self.median:.3g}"


def screen(trained: Sequence[int], losses: Sequence[float], least: float) -> Screened:
    """Separate the rows whose perplexity is below `least`.

    Args:
        trained: the trained tokens of each row.
        losses: nats per trained token of each row. Its exponential is the perplexity, so that the length of a row does
            not enter."""
    known = [loss < math.log(least) for loss in losses]
    parts = [[count for count, low in zip(trained, known, strict=True) if low is which] for which in (True, False)]
    return Screened(
        rows=len(known),
        dropped=[place for place, low in enumerate(known) if low],
        median=math.exp(statistics.median(losses)),
        tokens=[float(statistics.median(part)) for part in parts] if all(parts) else [],
    )


def store_screened(folder: Path, found: Screened, digest: str, least: float) -> None:
    """Write what was found into a trial's folder.

    Args:
        digest: of the data set before the screening.

    Raises: OSError."""
    write_json(folder / SCREENED, {"digest": digest, "least": least, "found": asdict(found)})


def stored_screened(folder: Path, digest: str, least: float) -> Screened | None:
    """Return what an earlier attempt found for the same data set and mark; None where there is none."""
    stored = read_json(folder / SCREENED)
    try:
        if (stored["digest"], stored["least"]) != (digest, least):
            return None
        return Screened(**stored["found"])
    except (KeyError, TypeError):
        return None


def row_losses(
    model: Any,
    examples: Sequence[Example],
    batches: Sequence[list[int]],
    pad_id: int,
    precision: DType,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> list[list[float]]:
    """Return for each batch the mean loss in nats per trained token of its rows.

    Args:
        batches: the places of the rows of each."""
    collator, found = Collator(pad_id=pad_id), []
    done, total = 0, sum(map(len, batches))
    with evaluating(model, precision, device):
        for places in batches:
            batch = collator([examples[place] for place in places])
            tensors = {name: part.to(device) for name, part in batch.items() if isinstance(part, torch.Tensor)}
            nats = losses_of_batch(model, tensors).tolist()
            found.append([each / examples[place].trained for place, each in zip(places, nats, strict=True)])
            done += len(places)
            progress(done, total)
    return found


def batches_of(examples: Sequence[Example], most_tokens: int) -> Iterator[list[int]]:
    """Yield the places of rows of like length, as many as fit.

    Args:
        most_tokens: the token slots of one batch, where a single row has no more."""
    places: list[int] = []
    sizes = sizes_of(examples)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        if places and (len(places) + 1) * sizes[places[0]] > most_tokens:
            yield places
            places = []
        places.append(place)
    if places:
        yield places
