"""Bring losses from the device to the host without a synchronisation, and watch them for divergence."""

import math
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lab.events import Step
from lora_lab.outcome import Diverged
from lora_lab.worker.data import TokenCounts

_NEAR = 5
"""Steps whose median is a level: single batches of few rows vary too much to be compared."""

_REMEMBERED = 10_000
"""Steps within which the beginning of a divergence is looked for."""

_IN_FLIGHT = 1024
"""Steps that may be queued on the device at a time; far more than a driver's own queue takes."""


@dataclass(slots=True)
class _Pending:
    t: float
    step: int
    loss: Tensor
    scale: Tensor
    counts: TokenCounts
    waited_seconds: float
    learning_rate: float | None
    done: torch.cuda.Event | None


class LossRelay:
    """Takes each step's loss as a device tensor and returns the step once the loss has arrived as a number.

    On CUDA the loss is copied into pinned memory behind the step's kernels, followed by an event. The host never
    waits, and two such events give the device's own time for a step. The memory does not grow with the steps.
    """

    def __init__(self, device: torch.device, first_scale: float = 1.0) -> None:
        self._scale = first_scale
        self._cuda = device.type == "cuda"
        self._losses = torch.empty(_IN_FLIGHT, pin_memory=self._cuda)
        self._scales = torch.ones(_IN_FLIGHT, pin_memory=self._cuda)
        self._pending: deque[_Pending] = deque()
        self._arrived: list[Step] = []
        self._last: tuple[float, torch.cuda.Event | None] | None = None

    def restart_clock(self) -> None:
        """Start the next step's time now. All steps before must have arrived, and the device must be idle."""
        self._last = (time.monotonic(), self._record())

    def _record(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def push(
        self,
        step: int,
        loss: Tensor,
        counts: TokenCounts,
        scale: Tensor | None = None,
        waited_seconds: float = 0.0,
        learning_rate: float | None = None,
    ) -> None:
        """Take the loss of a step that has been queued.

        Args:
            step: counts from 1; each is one more than the one before.
            loss: a scalar on the device.
            scale: the GradScaler's after the step. A scale that fell is the only sign of an overflowed and skipped step
                that all optimizers give: fused ones skip inside their kernel.
        """
        if len(self._pending) == _IN_FLIGHT:  # its place is needed
            self._arrived.append(self._take_oldest())
        place = step % _IN_FLIGHT
        loss_here, scale_here = self._losses[place], self._scales[place]
        loss_here.copy_(loss, non_blocking=self._cuda)
        if scale is not None:
            scale_here.copy_(scale, non_blocking=self._cuda)
        done = self._record()
        self._pending.append(
            _Pending(time.monotonic(), step, loss_here, scale_here, counts, waited_seconds, learning_rate, done)
        )

    def arrived(self, through: int | None = None) -> list[Step]:
        """Return the steps whose loss has arrived, in order, without waiting.

        Args:
            through: return the steps up to this one instead, and wait for them.
        """
        while self._pending and self._is_due(self._pending[0], through):
            self._arrived.append(self._take_oldest())
        arrived, self._arrived = self._arrived, []
        return arrived

    @staticmethod
    def _is_due(pending: _Pending, through: int | None) -> bool:
        if through is not None:
            return pending.step <= through
        return pending.done is None or pending.done.query()

    def _take_oldest(self) -> Step:
        pending = self._pending.popleft()
        if pending.done is not None:
            pending.done.synchronize()  # does not wait for one that has arrived
        scale = float(pending.scale)
        skipped, self._scale = scale < self._scale, scale
        seconds, self._last = self._seconds(pending), (pending.t, pending.done)
        return Step(
            t=pending.t,
            step=pending.step,
            seconds=seconds,
            loss=float(pending.loss),
            skipped=skipped,
            waited_seconds=pending.waited_seconds,
            learning_rate=pending.learning_rate,
            **asdict(pending.counts),
        )

    def _seconds(self, pending: _Pending) -> float | None:
        if self._last is None:
            return None
        t, done = self._last
        if pending.done is None or done is None:
            return pending.t - t
        return float(done.elapsed_time(pending.done)) / 1e3


class DivergenceWatch:
    """Detects a training loss that diverged: it is not finite, or its recent level (median of five steps) is more than
    `spike` nats per token above its first level."""

    def __init__(self, spike: float) -> None:
        self._spike = spike
        self._first: list[float] = []
        self._seen: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self._count = 0

    def see(self, step: int, loss: float) -> None:
        """Add a step's loss.

        Raises: Diverged, naming the step."""
        if not math.isfinite(loss):
            raise Diverged(f"the training loss was {loss} at step {step}", step)
        self._count += 1
        self._seen.append((step, loss))
        if len(self._first) < _NEAR:
            self._first.append(loss)
        start = statistics.median(self._first)
        recent = statistics.median(self._recent())
        if self._count >= 2 * _NEAR and recent > start + self._spike:
            began = self._began(start + self._spike)
            raise Diverged(
                f"the training loss rose from {start:.3f} to {recent:.3f}, more than measure.loss_spike={self._spike}; "
                f"it began at step {began}",
                began,
            )

    def _recent(self) -> list[float]:
        return [self._seen[-back][1] for back in range(1, min(_NEAR, len(self._seen)) + 1)]

    def _began(self, limit: float) -> int:
        """Return the step since which most losses have been high: a single hard batch long before is not where it
        began."""
        began, high = self._seen[-1][0], 0
        for steps, (step, loss) in enumerate(reversed(self._seen), 1):
            high += loss > limit
            if loss > limit and 2 * high > steps:
                began = step
        return began

    def state(self) -> dict[str, Any]:
        """Return what a later watch needs to go on from here, as JSON takes it."""
        recent = [list(seen) for seen in [*self._seen][-_NEAR:]]
        return {"first": list(self._first), "recent": recent, "count": self._count}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._first, self._count = list(state["first"]), state["count"]
        self._seen = deque(((step, loss) for step, loss in state["recent"]), maxlen=_REMEMBERED)
