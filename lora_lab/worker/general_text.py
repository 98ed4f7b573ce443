"""Make rows of the general text that comes with lora_lab: what they cost before and after shows what is forgotten."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

from lora_lab import dataset
from lora_lab.config import TrialConfig
from lora_lab.worker.data import IGNORED, Example

_FILE = Path(dataset.__file__).parent / "data" / "general_text.jsonl.gz"

_DEFAULT = 32
"""Passages in a job."""


def general_rows(config: TrialConfig) -> int:
    """Return how many passages are evaluated."""
    asked = config.measure.general_rows
    return (_DEFAULT if config.train.is_job else 0) if asked is None else asked


def general_examples(config: TrialConfig, tokenizer: Any, vocab_size: int) -> list[Example]:
    """Return the first passages, without a chat template and cut at seq_len; every token but the first is predicted.

    A passage that has a token without an embedding is left out, and one of less than two tokens."""
    with gzip.open(_FILE, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, general_rows(config))]
    tokens = [tokenizer(text)["input_ids"][: config.seq_len] for text in texts]
    return [Example(ids, [IGNORED, *ids[1:]]) for ids in tokens if len(ids) > 1 and max(ids) < vocab_size]
