"""Announce the phases of a trial, and the memory that each one took."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

from lora_lab.events import Event, PhaseBegan, PhaseMemory
from lora_lab.phase import Phase
from lora_lab.worker.vram_limit import VramLimit

Emit = Callable[[Event], None]
"""Sends an event to the parent."""

_TRAINING = (Phase.warm_up, Phase.window, Phase.profile)


class Replayed(Protocol):
    """A step that is replayed from CUDA graphs; torch's allocator does not see what comes and goes in it."""

    replay_peak_bytes: int
    recording_peak_bytes: int


class PhaseClock:
    """Announces phases, and the peak of torch's allocator in the one that ended."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._retries = 0
        self.present = Phase.start
        self.vram_limit: VramLimit | None = None
        """Applied whenever a phase begins."""
        self.replayed: Replayed | None = None
        """The step of an engine that replays CUDA graphs."""

    def enter(self, phase: Phase) -> None:
        """End the present phase and begin `phase`."""
        self.leave()
        self.present = phase
        if self.vram_limit is not None:
            self.vram_limit.apply()
        self._emit(PhaseBegan(t=time.monotonic(), phase=phase.value))

    def leave(self, part: str | None = None) -> None:
        """End the present phase, or a `part` of it: report its memory and reset the peaks."""
        if not torch.cuda.is_initialized():
            return
        retries = int(torch.cuda.memory_stats().get("num_alloc_retries", 0))
        free, total = torch.cuda.mem_get_info()
        self._emit(
            PhaseMemory(
                t=time.monotonic(),
                phase=part or self.present.value,
                peak_allocated_bytes=max(torch.cuda.max_memory_allocated(), self._unseen_peak_bytes()),
                peak_reserved_bytes=torch.cuda.max_memory_reserved(),
                reserved_bytes=torch.cuda.memory_reserved(),
                device_used_bytes=total - free,
                retries=retries - self._retries,
            )
        )
        self._retries = retries
        torch.cuda.reset_peak_memory_stats()

    def _unseen_peak_bytes(self) -> int:
        if self.replayed is None:
            return 0
        if self.present is Phase.compilation:
            return self.replayed.recording_peak_bytes
        return self.replayed.replay_peak_bytes if self.present in _TRAINING else 0
