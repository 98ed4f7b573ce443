"""Watch several adapters that train together, each as if it were alone."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_lab.config import MeasureConfig
from lora_lab.events import Ended, Step
from lora_lab.outcome import Diverged, end_of
from lora_lab.worker.async_losses import DivergenceWatch, LossRelay
from lora_lab.worker.callback import TelemetryCallback
from lora_lab.worker.members import Members
from lora_lab.worker.phases import Emit, PhaseClock


class MembersTelemetry(TelemetryCallback):
    """Sends the steps of every member. One that diverges says how it ended, and the others go on."""

    def __init__(
        self,
        measure: MeasureConfig,
        device: torch.device,
        emit: Emit,
        clock: PhaseClock,
        together: Members,
        emit_of: Callable[[int], Emit],
    ) -> None:
        self._together = together
        self._losses: Tensor = together.losses
        self._emits = [emit_of(number) for number in range(len(together))]
        self._relays = [LossRelay(device) for _ in self._emits]
        self._watches = [DivergenceWatch(measure.loss_spike) for _ in self._emits]
        super().__init__(measure, device, emit, clock)

    def _after_forward(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        super()._after_forward(model, args, kwargs, output)
        if model.training and output.loss is not None:
            self._losses = self._losses + self._together.losses

    def _forget_step(self) -> None:
        super()._forget_step()
        self._losses = torch.zeros(len(self._together), device=self._device)

    def _restart_clock(self) -> None:
        for relay in self._relays:
            relay.restart_clock()

    def _take_step(self, step: int, learning_rate: float | None = None) -> None:
        losses = self._losses if self._loss_is_a_share else self._losses / max(1, self._micro_batches)
        for relay, loss in zip(self._relays, losses, strict=True):
            relay.push(step, loss, self._counts, None, self._waited_seconds, learning_rate)
        self._forget_step()

    def _send_through(self, through: int | None) -> None:
        """Send the steps whose losses have arrived.

        Raises: Diverged, once every member has."""
        for number, (relay, watch, emit) in enumerate(zip(self._relays, self._watches, self._emits, strict=True)):
            for step in relay.arrived(through):
                if number not in self._together.diverged:
                    emit(step)
                    self._see(number, watch, step, emit)

    def _see(self, number: int, watch: DivergenceWatch, step: Step, emit: Emit) -> None:
        try:
            watch.see(step.step, step.loss)
        except Diverged as diverged:
            end = end_of(diverged)
            emit(Ended(t=time.monotonic(), outcome=end.outcome.value, reason=end.reason, step=end.step))
            self._together.diverged.add(number)
            if len(self._together.diverged) == len(self._together):
                raise
