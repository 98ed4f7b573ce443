"""Read all sensors of a trial, the card's and the CPU's, as one sample."""

import time
from collections.abc import Callable
from dataclasses import replace

from lora_lab.telemetry.nvml import Card
from lora_lab.telemetry.rapl import Rapl
from lora_lab.telemetry.sampler import Sample


def reader(card: Card | None, rapl: Rapl) -> Callable[[bool], Sample] | None:
    """Return the function that a sampler calls; None where there is nothing to read."""
    if card is None and rapl.absent:
        return None

    def read(slow: bool) -> Sample:
        """Read once.

        Raises: SensorFailed when the card does not answer at all."""
        sample = Sample(t=time.monotonic()) if card is None else card.sample(slow)
        joules = rapl.joules()
        # without a card the time is the CPU's; a card's calls take milliseconds, this one microseconds
        return sample if joules is None else replace(sample, cpu_joules=joules)

    return read
