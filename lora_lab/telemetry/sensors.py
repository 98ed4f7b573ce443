"""Read all sensors of a trial: one sample per card, with the CPU's energy in the first."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_lab.telemetry.nvml import Card
from lora_lab.telemetry.rapl import Rapl
from lora_lab.telemetry.sampler import Sample


def reader(cards: Sequence[Card], rapl: Rapl) -> Callable[[bool], list[Sample]] | None:
    """Return what a sampler calls: it reads one sample a card. None where there is nothing to read."""
    if not cards and rapl.absent:
        return None

    def read(slow: bool) -> list[Sample]:
        """Read every sensor once. Raises: SensorFailed when a card does not answer at all."""
        samples = read_cards(cards, slow) or [Sample(t=time.monotonic())]
        joules = rapl.joules()
        # with a card the time is the card's, whose calls take milliseconds; this one takes microseconds
        return samples if joules is None else [replace(samples[0], cpu_joules=joules), *samples[1:]]

    return read


def read_cards(cards: Sequence[Card], slow: bool) -> list[Sample]:
    """Read one sample of each card.

    Raises: SensorFailed when a card does not answer at all."""
    return [replace(card.sample(slow), card=place) for place, card in enumerate(cards)]
