"""One trial from the worker's side: its stages one after the other, and how it ended."""

import contextlib
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from lora_lab.config import TrialConfig
from lora_lab.cotrain import Member
from lora_lab.events import Ended
from lora_lab.outcome import End, Outcome, end_of
from lora_lab.seat import Seat
from lora_lab.worker.group import Group
from lora_lab.worker.phases import Emit, PhaseClock
from lora_lab.worker.stages import STAGES
from lora_lab.worker.stages.stage import TrialContext


def run_trial(
    config: TrialConfig, folder: Path, emit: Emit, seat: Seat | None = None, members: Sequence[Member] = ()
) -> None:
    """Run one trial and report everything about it through `emit`; the last event is Ended.

    Args:
        config: what to run.
        folder: where the adapter is left, as `adapter/` in PEFT's layout.
        emit: takes each event; must return quickly.
        seat: this worker's among those that share the trial; None for a worker alone.
        members: the trials that train together, each with an adapter of its own; `config` and `folder` are the first's.
    """
    clock = PhaseClock(emit)
    try:
        trial = TrialContext(
            config=config, folder=folder, emit=emit, clock=clock, group=Group(seat), members=tuple(members)
        )
        for stage in STAGES:
            if not stage.is_needed(trial) or (stage.lead_only and not trial.group.is_lead):
                continue
            if stage.phase is not None:
                clock.enter(stage.phase)
            stage.run_for_all(trial)
        clock.leave()
        end = End(outcome=Outcome.finished, reason="")
    except Exception as error:  # broad: every way to stop becomes a recorded end
        end = end_of(error)
        with contextlib.suppress(RuntimeError):  # a CUDA context that failed answers nothing any more
            clock.leave()
    emit(
        Ended(
            t=time.monotonic(),
            outcome=end.outcome.value,
            reason=end.reason,
            traceback=end.traceback,
            step=end.step,
            asked_bytes=end.asked_bytes,
            peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        )
    )
