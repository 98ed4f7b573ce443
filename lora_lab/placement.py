"""Placement of a trial: its cards, its host, and how its workers share the work."""

import platform
from collections import Counter
from dataclasses import dataclass, field

from lora_lab.telemetry.nvml import Card


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Cards, host and workers of one trial. By default one worker calculates on the CPU of this host."""

    cards: tuple[Card, ...] = ()
    """The cards in the order in which the workers see them; empty when the CPU calculates."""
    host: str = field(default_factory=platform.node)
    world_size: int = 1
    """The number of workers."""
    strategy: str = "single"
    """How the workers share the work; with `single` one worker does all of it."""

    @property
    def name(self) -> str:
        """Return the device's name for messages."""
        counts = Counter(card.name for card in self.cards)
        return " and ".join(name if n == 1 else f"{n} x {name}" for name, n in counts.items()) or "the CPU"
