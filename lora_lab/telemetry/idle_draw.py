"""Calculate the idle power of a trial's cards from samples: a pure function, so that it can be calculated again."""

from collections.abc import Sequence

from lora_lab.telemetry.energy import window_energy
from lora_lab.telemetry.sampler import Sample


def idle_draw(start: float, end: float, samples: Sequence[Sample]) -> tuple[float, float, str] | str:
    """Return (watts of all cards together, error bound, source) between two moments, or why there are none.

    Args:
        start: seconds of time.monotonic(), as `end`.
    """
    watts = error_watts = 0.0
    sources: dict[str, None] = {}
    for card in sorted({sample.card for sample in samples}) or [0]:
        energy = window_energy(start, end, [sample for sample in samples if sample.card == card])
        if energy.joules is None or energy.error_joules is None:
            return energy.reason
        watts += energy.joules / (end - start)
        error_watts += energy.error_joules / (end - start)
        sources[energy.source] = None
    return watts, error_watts, " and ".join(sources)
