"""Say of a trial beforehand what it will take, or why that is not known: for records, single trials and sweeps."""

from dataclasses import dataclass, replace

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.fit.check import check
from lora_lab.fit.estimate import DOUBTFUL, GIB, TOO_LARGE, Estimate, estimate
from lora_lab.fit.shapes import shapes_of
from lora_lab.options import Batching, DataSource

_SHORT = 64
"""Tokens: rows of text may be as short as this, as far as is known before they are tokenised."""


@dataclass(frozen=True, slots=True)
class Beforehand:
    """What is known of a trial's memory before it runs."""

    estimate: Estimate | None
    reason: str
    """Why there is no estimate; empty where there is one."""


def beforehand(config: TrialConfig) -> Beforehand:
    """Estimate a trial's memory. Nothing is loaded or downloaded, so a hub model must be in the local cache."""
    try:
        shapes = shapes_of(config.model)
        check(config, shapes)
        return Beforehand(estimate(config, shapes), "")
    except InvalidInput as unknown:
        return Beforehand(None, str(unknown))


def capacity(config: TrialConfig, card_bytes: int) -> int:
    """Return the bytes that a trial may take of a card: its emulated capacity, if that is less."""
    limit = config.vram_limit_gib
    return card_bytes if limit is None else min(card_bytes, int(limit * GIB))


def verdict_of(said: Estimate, room: float) -> str:
    """Return FITS, DOUBTFUL or TOO_LARGE for a card with `room` bytes. Where rows may be shorter than seq_len, a trial
    is too large only if it is with short rows too."""
    verdict, config = said.verdict(room), said.config
    is_full = config.data.source is DataSource.random_tokens or config.data.batching is not Batching.longest
    if verdict != TOO_LARGE or is_full or config.seq_len <= _SHORT:
        return verdict
    shorter = estimate(replace(config, seq_len=_SHORT), said.shapes).verdict(room)
    return TOO_LARGE if shorter == TOO_LARGE else DOUBTFUL
