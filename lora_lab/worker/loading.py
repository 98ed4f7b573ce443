"""Load the tokenised data set of a trial: from the cache, or from its rows."""

import contextlib
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lab.config import TrialConfig
from lora_lab.worker import token_cache
from lora_lab.worker.examples import Examples, check_enough, packed_rows
from lora_lab.worker.token_key import State, is_unchanged, key_of, state_of
from lora_lab.worker.token_rows import TokenRows, TokenWriter
from lora_lab.worker.tokenising import Report, make_examples, quiet

_NO_FACTS = ("train", "heldout", "lengths", "from_cache")
"""Fields of Examples that an entry of the cache has as tables, or not at all."""


def load_examples(config: TrialConfig, tokenizer: Any, vocab_size: int, report: Report = quiet) -> Examples:
    """Return the rows the config names as tokens, held out, and packed if asked for.

    Args:
        report: gets the rows that are done so far.

    Raises: InvalidInput when there are too few usable rows or the rows could not be loaded.
    """
    state = state_of(config)
    key = key_of(config, state, tokenizer, vocab_size) if state else None
    if key is None:
        found = make_examples(config, tokenizer, vocab_size, TokenWriter(None), report)
    else:
        found = _cached(config, key) or _made(config, tokenizer, vocab_size, report, key, state)
    if config.data.min_perplexity is not None:  # packed after the screening
        return found
    return found.trained_on(packed_rows(config, found.documents))


def _cached(config: TrialConfig, key: str) -> Examples | None:
    """Return the data set of an entry; None where there is none that is whole."""
    stored = token_cache.load(key)
    if stored is None:
        return None
    tokens, tables, facts = stored
    train, heldout = TokenRows(tokens, tables["train"]), TokenRows(tokens, tables["heldout"])
    of_file = len(heldout) if config.data.heldout_path is not None else 0
    check_enough(config, len(train) + len(heldout) - of_file, of_file)
    return Examples(train=train, heldout=heldout, lengths=tables["lengths"], from_cache=True, **facts)


def _made(config: TrialConfig, tokenizer: Any, vocab_size: int, report: Report, key: str, state: State) -> Examples:
    """Tokenise the rows, and cache that. A disk that takes no more is only said."""
    with contextlib.ExitStack() as stack:
        fault: OSError | None = None
        try:
            folder = stack.enter_context(token_cache.aside())
            writer = TokenWriter(folder / token_cache.TOKENS)
        except OSError as error:
            fault, writer = error, TokenWriter(None)
        stack.callback(writer.close)
        made = make_examples(config, tokenizer, vocab_size, writer, report)
        fault = fault or writer.fault
        if fault is None and is_unchanged(state):
            try:
                token_cache.store(folder, key, _tables(made), _facts(made))
            except OSError as error:
                fault = error
    if fault is None:
        return made
    return replace(made, remarks=[*made.remarks, f"the tokens are not cached for the next trial: {fault}"])


def _tables(made: Examples) -> dict[str, NDArray[np.int64]]:
    assert isinstance(made.train, TokenRows)
    return {"train": made.train.table, "heldout": made.heldout.table, "lengths": made.lengths}


def _facts(made: Examples) -> dict[str, Any]:
    return {each.name: getattr(made, each.name) for each in fields(made) if each.name not in _NO_FACTS}
