"""Placement of a trial: its cards, its host, and how its workers share the work."""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_lab.telemetry.nvml import Card


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Cards, host and workers of one trial. By default one worker calculates on the CPU of this host."""

    cards: tuple[Card, ...] = ()
    """The cards in the order in which the workers see them; empty when the CPU calculates."""
    cores: tuple[int, ...] = ()
    """The cores of the CPU that the worker may use, by their numbers; empty for all of them, and on cards."""
    host: str = field(default_factory=platform.node)
    world_size: int = 1
    """The number of workers."""
    strategy: str = "single"
    """How the workers share the work; with `single` one worker does all of it."""

    @property
    def name(self) -> str:
        """Return the device's name for messages."""
        if self.cores:
            return f"{in_ranges(self.cores)} of the CPU"
        counts = Counter(card.name for card in self.cards)
        return " and ".join(name if n == 1 else f"{n} x {name}" for name, n in counts.items()) or "the CPU"


def in_ranges(cores: Sequence[int]) -> str:
    """Return the numbers of cores in words: core 3, or cores 0-3,8."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and parts[-1][-1] == core - 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    said = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"core{'' if len(cores) == 1 else 's'} {said}"
