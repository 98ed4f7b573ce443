"""Find which process on the card is the worker, and which others were there."""

from collections.abc import Sequence

from lora_lab.events import Event, Ready
from lora_lab.telemetry.attempts import with_samples
from lora_lab.telemetry.sampler import Sample


def worker_pids(events: Sequence[Event], samples: Sequence[Sample], parent_pid: int | None) -> set[int]:
    """Return the pids of the workers of all attempts, of those that the driver lists. Of several workers each has the
    card of its rank."""
    found = (
        worker_pid(
            [event for event in said if not isinstance(event, Ready) or event.rank == card],
            [sample for sample in seen if sample.card == card],
            parent_pid,
        )
        for said, seen in with_samples(events, samples)
        for card in sorted({sample.card for sample in seen})
    )
    return {pid for pid in found if pid is not None}


def worker_pid(events: Sequence[Event], samples: Sequence[Sample], parent_pid: int | None) -> int | None:
    """Return the pid of one attempt's worker as the driver lists it; None when it was never listed.

    In a container the driver lists processes by numbers of the host. The worker is then the one process that
    came onto the card after the sampling had begun.

    Args:
        parent_pid: the process that is its own worker with isolation=inline.
    """
    pid = next((event.pid for event in events if isinstance(event, Ready)), parent_pid)
    listed = [dict(sample.processes) for sample in samples if sample.processes is not None]
    if any(pid in processes for processes in listed):
        return pid
    came = {number for processes in listed for number in processes} - set(listed[0] if listed else {})
    return came.pop() if len(came) == 1 else None


def foreign_pids(events: Sequence[Event], samples: Sequence[Sample], parent_pid: int | None) -> set[int]:
    """Return the processes that computed on the card during the trial and are not one of its workers."""
    listed = {pid for sample in samples for pid, _ in sample.processes or ()}
    return listed - worker_pids(events, samples, parent_pid) - {parent_pid}
