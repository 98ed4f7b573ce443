"""Calculate a card's idle power from its samples: a pure function, so that it can be calculated again."""

from collections.abc import Sequence

from lora_lab.telemetry.energy import window_energy
from lora_lab.telemetry.sampler import Sample


def idle_draw(start: float, end: float, samples: Sequence[Sample]) -> tuple[float, float, str] | str:
    """Return (watts, error bound, source) between two moments, or why there are none.

    Args:
        start: seconds of time.monotonic(), as `end`.
    """
    energy = window_energy(start, end, samples)
    if energy.joules is None or energy.error_joules is None:
        return energy.reason
    return energy.joules / (end - start), energy.error_joules / (end - start), energy.source
