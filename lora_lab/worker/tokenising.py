"""Turn the rows that a config names into tokens: read, chosen, laid out, and split into held-out and other rows.

The text of many rows lies in a file meanwhile, and their tokens in another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.dataset.content import Mark, kinds_of
from lora_lab.dataset.kept_rows import KeptRow, RowFile
from lora_lab.dataset.row import Passage, Row
from lora_lab.dataset.selection import Selected, select
from lora_lab.dataset.sources import heldout_rows, read_rows
from lora_lab.dataset.split import split_rows
from lora_lab.options import DataSource, TrainOn
from lora_lab.worker.example import IGNORED, Example, sha256_of
from lora_lab.worker.examples import Examples, check_enough
from lora_lab.worker.laid_out import LaidOut, Losses
from lora_lab.worker.layouts import Layouts
from lora_lab.worker.token_cache import tokens_folder
from lora_lab.worker.token_rows import TokenRows, TokenWriter

Report = Callable[[int, int], None]
"""Gets the rows that are done, and their number; 0 while that is not known."""


def quiet(_: int, __: int) -> None:
    """Report nothing."""


@dataclass(slots=True)
class _Made:
    """All rows as tokens, and what they were made of."""

    chosen: Selected[Mark]
    tokens: TokenRows
    lengths: NDArray[np.int64]
    """Tokens of every row before it was cut; empty for random tokens."""
    empty: int = 0
    losses: Losses = field(default_factory=Losses)
    end_of_turn: str = ""
    kinds: str = ""
    remarks: list[str] = field(default_factory=list)


def make_examples(
    config: TrialConfig, tokenizer: Any, vocab_size: int, writer: TokenWriter, report: Report = quiet
) -> Examples:
    """Read the rows the config names, tokenise, and hold out. They are not packed.

    Args:
        writer: takes the tokens, and is finished afterwards.

    Raises: InvalidInput when there are too few usable rows or the rows could not be loaded.
    """
    if config.data.source is DataSource.random_tokens:
        made = _random(config, vocab_size, writer)
    else:
        made = _laid_out(config, tokenizer, vocab_size, writer, report)
    chosen, tokens = made.chosen, made.tokens
    usable = np.flatnonzero(tokens.trained > 0)
    if not len(usable):
        raise InvalidInput(
            f"at seq_len={config.seq_len} no row has a token left to train on: every prompt alone is longer. "
            "Raise seq_len."
        )
    own = int((usable >= len(chosen.rows)).sum())
    check_enough(config, len(usable) - own, own)
    rows = [*chosen.rows, *chosen.heldout]
    split = split_rows([rows[place] for place in usable.tolist()], config.data.holdout, own)
    trained = np.ones(len(usable), bool)
    trained[split.held] = False
    train, heldout = tokens.chosen(usable[trained]), tokens.chosen(usable[split.held])
    return Examples(
        train=train,
        heldout=heldout,
        rows_read=len(rows) + made.empty + chosen.dropped + chosen.in_both,
        rows_truncated=int((tokens.lengths > tokens.sizes).sum()),
        rows_without_labels=len(rows) - len(usable) + made.empty,
        rows_lost=made.losses.lost,
        rows_apart=made.losses.apart,
        end_of_turn=made.end_of_turn,
        kinds=made.kinds,
        remarks=made.remarks,
        rows_repeated=chosen.repeated,
        rows_near_repeated=chosen.near_repeated,
        rows_dropped=chosen.dropped,
        rows_in_both=chosen.in_both,
        rows_heldout_prompt_trained=split.prompts_trained,
        lengths=made.lengths,
        digest=sha256_of(chain(train, heldout)),
    )


def _random(config: TrialConfig, vocab_size: int, writer: TokenWriter) -> _Made:
    count, generator = config.data.rows or 0, torch.Generator().manual_seed(config.seed)
    for row in torch.randint(vocab_size, (count, config.seq_len), generator=generator):
        ids = row.tolist()
        writer.append(Example(ids, [IGNORED, *ids[1:]]), len(ids))
    marks = [Mark(Passage(prompt="", text=str(number))) for number in range(count)]  # none are equal
    return _Made(Selected(marks), writer.finished(), lengths=np.zeros(0, np.int64))


def _laid_out(config: TrialConfig, tokenizer: Any, vocab_size: int, writer: TokenWriter, report: Report) -> _Made:
    file = RowFile(tokens_folder())

    def keep(row: Row) -> KeptRow:
        report(file.rows, 0)
        return file.keep(row)

    found = read_rows(config.data, keep)
    of_file = None if config.data.heldout_path is None else heldout_rows(config.data, keep)
    chosen = select(config.data, found.rows, of_file)
    rows = [*chosen.rows, *chosen.heldout]
    layouts, losses = Layouts(tokenizer, vocab_size, config.data.train_on), Losses()
    for done, kept in enumerate(rows):
        row = kept.row
        laid = layouts.lay_out(row)
        losses.count(row, laid, tokenizer)
        writer.append(_example(laid, config.seq_len), len(laid.ids))
        report(done + 1, len(rows))
    if losses.lost * 2 > losses.rows:
        raise InvalidInput(*losses.sentences(), *layouts.remedies((kept.row for kept in rows), losses))
    remarks = [*found.remarks, *chosen.remarks, *layouts.remarks(losses)]
    if file.fault is not None:
        remarks.append(f"the text of the rows stays in memory, since the disk does not take it: {file.fault}")
    tokens = writer.finished()
    writer.fault = writer.fault or file.fault  # so that what is said of the disk is not cached
    return _Made(
        chosen=cast(Selected[Mark], chosen),
        tokens=tokens,
        lengths=tokens.lengths,
        empty=found.empty,
        losses=losses,
        end_of_turn=layouts.end_of_turn,
        kinds=kinds_of(rows),
        remarks=remarks,
    )


def tokenize(row: Row, tokenizer: Any, seq_len: int, train_on: TrainOn = TrainOn.answers) -> Example:
    """Turn one row into tokens, of which the answers and their ends of turn are trained.

    Raises: InvalidInput when the model's chat template can't lay it out."""
    return _example(Layouts(tokenizer, None, train_on).lay_out(row), seq_len)


def _example(laid: LaidOut, seq_len: int) -> Example:
    labels = [IGNORED] * len(laid.ids)
    for start, end in laid.spans:
        labels[start:end] = laid.ids[start:end]
    return Example(laid.ids[:seq_len], labels[:seq_len], truncated=len(laid.ids) > seq_len)
