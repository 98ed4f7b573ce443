"""Report from inside the Trainer of a job: windows between evaluations and checkpoints, and when these are due."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_lab.config import MeasureConfig
from lora_lab.phase import FIRST_STEP, Phase
from lora_lab.worker.async_losses import DivergenceWatch
from lora_lab.worker.callback import Telemetry
from lora_lab.worker.group import Group
from lora_lab.worker.job_plan import JobPlan
from lora_lab.worker.paged_state import page_again
from lora_lab.worker.phases import Emit, PhaseClock


class JobTelemetry(Telemetry):
    """Watches the training of a job. Steps lie in a window from the end of the warm-up on, but for evaluations and
    checkpoints: the window closes before them and the next one opens right behind. The warm-up counts from where
    training begins or goes on."""

    def __init__(
        self,
        measure: MeasureConfig,
        plan: JobPlan,
        evaluates: bool,
        device: torch.device,
        emit: Emit,
        clock: PhaseClock,
        group: Group | None = None,
    ) -> None:
        super().__init__(measure, device, emit, clock, group)
        self._spike = measure.loss_spike
        self._plan = plan
        self._evaluates = evaluates
        self._warm_from = 0
        self._step = 0
        self._in_window = False
        self._reported = False
        self._rate = 0.0
        self.rate_factor = 1.0
        """By this the learning rate of the next training is multiplied."""
        self.on_begin: Callable[[], None] = lambda: None
        """Called when training begins, before its first step."""

    def watch_state(self) -> dict[str, Any]:
        """Return the state of the watch over the loss, for a checkpoint."""
        return self._watch.state()

    def restore_watch(self, state: dict[str, Any]) -> None:
        """Let the watch over the loss go on from a checkpoint."""
        self._watch = DivergenceWatch(self._spike)
        self._watch.restore(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the learning rate, and enter the warm-up or open a window."""
        page_again(kwargs["optimizer"])
        _multiply(kwargs["optimizer"], kwargs["lr_scheduler"], self.rate_factor)
        self._step = self._warm_from = state.global_step
        self.on_begin()
        self._begin()
        self.go_on()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate of the step."""
        self._rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push the loss of the queued step, say what is due, and open or close a window."""
        self._step = step = state.global_step
        control.should_evaluate |= self._evaluates and self._plan.evaluates_after(step)
        control.should_save |= self._plan.saves_after(step)
        self._take_step(step, self._rate)
        pause = control.should_evaluate or control.should_save or step == self._plan.steps
        if pause:
            self.pause()
        if step == self._warm_from + 1 and self._warmup_steps:
            self._clock.leave(FIRST_STEP)
        if not self._reported and (pause or self._is_warm):
            self._reported = True
            self.on_stepped()
        if self._clock.vram_limit is not None and not self._is_warm:
            self._clock.vram_limit.apply()
        if not (pause or self._in_window) and self._is_warm:
            self._open_window(step)
            self._in_window = True
        self._send_arrived(step)
        self._stepped_t = time.monotonic()

    @property
    def _is_warm(self) -> bool:
        return self._step - self._warm_from >= self._warmup_steps

    def pause(self) -> None:
        """Wait for the queued steps, and close the window if one is open."""
        self._group.end_steps()
        if self._in_window:
            self._in_window = False
            self._close_window(self._step)
        self._settle()

    def go_on(self) -> None:
        """Open a window for the steps that follow; the warm-up goes on where it is not over."""
        if self._is_warm:
            self._open_window(self._step)
            self._in_window = True
        else:
            if self._clock.present is not Phase.warm_up:
                self._clock.enter(Phase.warm_up)
            self._synchronize()
            self._relay.restart_clock()
        self._stepped_t = time.monotonic()

    def abandon(self) -> None:
        """Close the window behind steps that do not count any more; the watch does not see them."""
        self._group.end_steps()
        self._synchronize()
        for step in self._relay.arrived():
            self._emit(step)
        if self._in_window:
            self._in_window = False
            self._close_window(self._step)


def _multiply(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rates of all groups, present and to come."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
