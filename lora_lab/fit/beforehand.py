"""Say of a trial beforehand what it will take, or why that is not known: for records, single trials and sweeps."""

from dataclasses import dataclass

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.fit.check import check
from lora_lab.fit.estimate import GIB, Estimate, estimate
from lora_lab.fit.shapes import shapes_of


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
