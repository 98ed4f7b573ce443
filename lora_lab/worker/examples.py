"""The tokenised data set of one trial, and what must be true of it."""

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.dataset.selection import check_left
from lora_lab.dataset.split import check_row_count
from lora_lab.options import Batching
from lora_lab.worker.data import Packed, pack
from lora_lab.worker.example import sha256_of
from lora_lab.worker.token_rows import TokenRows


@dataclass(frozen=True, slots=True)
class Examples:
    """The tokenised data set of one trial."""

    train: TokenRows | Packed[TokenRows]
    heldout: TokenRows
    rows_read: int
    rows_truncated: int
    rows_without_labels: int
    rows_repeated: int
    rows_heldout_prompt_trained: int
    lengths: NDArray[np.int64]
    """Tokens of every row before it was cut; empty for random tokens."""
    digest: str
    """The sha256 over every example's ids and labels, in order."""
    rows_near_repeated: int | None = None
    """Rows that nearly equal an earlier one; None where that was not looked for."""
    rows_dropped: int = 0
    """Rows that are not used because they equal an earlier one, or nearly so."""
    rows_in_both: int = 0
    """Rows that are not trained on because the file of held-out rows has them."""
    rows_low_perplexity: int = 0
    """Rows that data.min_perplexity left out."""
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
    from_cache: bool = False
    """The tokens were there from an earlier trial."""

    @property
    def documents(self) -> TokenRows:
        """Return the rows to train on, each by itself where they are packed."""
        return self.train if isinstance(self.train, TokenRows) else self.train.documents

    def trained_on(self, train: TokenRows | Packed[TokenRows]) -> "Examples":
        """Return the same data set with other rows to train on."""
        return self if train is self.train else replace(self, train=train, digest=sha256_of(chain(train, self.heldout)))


def check_enough(config: TrialConfig, rows: int, of_file: int) -> None:
    """Raise InvalidInput unless the usable rows fill one optimizer step.

    Args:
        rows: all of them, without those of data.heldout_path.
        of_file: those of data.heldout_path.
    """
    packed = config.data.batching is Batching.packed
    needed = 1 if packed else config.rows_per_step
    which = f"rows with something to train on at seq_len={config.seq_len}"
    if config.data.heldout_path is not None:
        check_left(rows, of_file, needed, which)
    else:
        check_row_count(rows, config.data.holdout, needed, which)


def packed_rows(config: TrialConfig, train: TokenRows) -> TokenRows | Packed[TokenRows]:
    """Pack rows if data.batching asks for that.

    Raises: InvalidInput when the packed ones do not fill one optimizer step."""
    if config.data.batching is not Batching.packed:
        return train
    packed = pack(train, config.seq_len)
    check_filled(config, len(packed), f"rows when packed to seq_len={config.seq_len}")
    return packed


def check_filled(config: TrialConfig, count: int, which: str) -> None:
    """Raise InvalidInput unless `count` rows fill one optimizer step."""
    needed = config.rows_per_step
    if count < needed:
        raise InvalidInput(
            f"the data has {count} {which}, but one step needs {needed} (batch_size x grad_accum_steps x workers). Use "
            "more rows or a smaller batch_size."
        )


def check_token_ids(examples: Examples, tokenizer: Any, vocab_size: int) -> None:
    """Raise InvalidInput for a token that has no embedding: on a GPU it would cost the worker."""
    if examples.heldout.highest < vocab_size:
        return
    every = (token for example in chain(examples.documents, examples.heldout) for token in example.ids)
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
