"""Bring losses from the device to the host without a synchronisation, and watch them for divergence."""

import math
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lora_lab.events import Step
from lora_lab.outcome import Diverged
from lora_lab.worker.data import TokenCounts

_NEAR = 5
"""Steps whose median is a level: single batches of few rows vary too much to be compared."""


@dataclass(slots=True)
class _Pending:
    t: float
    step: int
    loss: Tensor
    scale: Tensor
    counts: TokenCounts
    waited_seconds: float
    done: torch.cuda.Event | None


class LossRelay:
    """Takes each step's loss as a device tensor and returns the step once the loss has arrived as a number.

    On CUDA the loss is copied into pinned memory behind the step's kernels, followed by an event. The host never
    waits, and two such events give the device's own time for a step.
    """

    def __init__(self, device: torch.device, steps: int, first_scale: float = 1.0) -> None:
        self._scale = first_scale
        self._cuda = device.type == "cuda"
        self._losses = torch.empty(steps, pin_memory=self._cuda)
        self._scales = torch.ones(steps, pin_memory=self._cuda)
        self._pending: list[_Pending] = []
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
        self, step: int, loss: Tensor, counts: TokenCounts, scale: Tensor | None = None, waited_seconds: float = 0.0
    ) -> None:
        """Take the loss of a step that has been queued.

        Args:
            step: counts from 1.
            loss: a scalar on the device.
            scale: the GradScaler's after the step. A scale that fell is the only sign of an overflowed and skipped step
                that all optimizers give: fused ones skip inside their kernel.
        """
        loss_here, scale_here = self._losses[step - 1], self._scales[step - 1]
        loss_here.copy_(loss, non_blocking=self._cuda)
        if scale is not None:
            scale_here.copy_(scale, non_blocking=self._cuda)
        done = self._record()
        self._pending.append(_Pending(time.monotonic(), step, loss_here, scale_here, counts, waited_seconds, done))

    def arrived(self) -> list[Step]:
        """Return the steps whose loss has arrived, in order, without waiting."""
        steps = []
        while self._pending and (self._pending[0].done is None or self._pending[0].done.query()):
            pending = self._pending.pop(0)
            scale = float(pending.scale)
            skipped, self._scale = scale < self._scale, scale
            seconds, self._last = self._seconds(pending), (pending.t, pending.done)
            steps.append(
                Step(
                    t=pending.t,
                    step=pending.step,
                    seconds=seconds,
                    loss=float(pending.loss),
                    skipped=skipped,
                    waited_seconds=pending.waited_seconds,
                    **asdict(pending.counts),
                )
            )
        return steps

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
        self._losses: list[float] = []

    def see(self, step: int, loss: float) -> None:
        """Add a step's loss.

        Raises: Diverged, naming the step."""
        if not math.isfinite(loss):
            raise Diverged(f"the training loss was {loss} at step {step}", step)
        self._losses.append(loss)
        start = statistics.median(self._losses[:_NEAR])
        recent = statistics.median(self._losses[-_NEAR:])
        if len(self._losses) >= 2 * _NEAR and recent > start + self._spike:
            high = [seen > start + self._spike for seen in self._losses]
            # since when most have been high: a single hard batch long before is not where it began
            began = next(i for i, now in enumerate(high, 1) if now and 2 * sum(high[i - 1 :]) > len(high) - i + 1)
            raise Diverged(
                f"the training loss rose from {start:.3f} to {recent:.3f}, more than measure.loss_spike={self._spike}; "
                f"it began at step {began}",
                began,
            )
