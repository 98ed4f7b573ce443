"""Judge by the card's own reading whether a trial stayed within an emulated capacity."""

from collections.abc import Sequence

from lora_lab.outcome import End, Outcome
from lora_lab.telemetry.figures import GIB
from lora_lab.telemetry.sampler import Sample


def within_capacity(end: End, limit_gib: float, before: Sequence[int | None], samples: Sequence[Sample]) -> End:
    """Return out of memory for a finished trial whose card took more than `limit_gib` over what was in use before.

    The allocator's cap does not limit what others allocate (the context, libraries, managed memory).

    Args:
        before: bytes in use on each card before the trial.
    """
    rises = (sample.used_bytes - (before[sample.card] or 0) for sample in samples if sample.used_bytes)
    peak_gib = max(rises, default=0) / GIB
    if end.outcome is not Outcome.finished or peak_gib <= limit_gib:
        return end
    return End(
        outcome=Outcome.out_of_memory,
        reason=f"the card's reading rose by {peak_gib:.2f} GiB, beyond vram_limit_gib={limit_gib:g}: torch stayed "
        "within its share, but CUDA's context, libraries and managed memory needed more than the rest",
    )
