"""Report from inside Trainer: steps, the window's edges, losses."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_lab.config import MeasureConfig
from lora_lab.events import Warned, WindowClosed, WindowOpened
from lora_lab.phase import FIRST_STEP, Phase
from lora_lab.worker.async_losses import DivergenceWatch, LossRelay
from lora_lab.worker.attention import AttentionKernels
from lora_lab.worker.data import TokenCounts
from lora_lab.worker.group import Group
from lora_lab.worker.phases import Emit, PhaseClock
from lora_lab.worker.profiling import StepProfiler

_BEHIND = 2
"""Steps that several workers may have queued on their cards while they wait for a loss."""


class Telemetry(TrainerCallback):
    """Watches a training from inside; its subclasses say when a window opens and closes.

    Trainer passes its callbacks neither loss nor inputs, so two hooks on the model read them: the first takes the
    token counts out of the batch, the second adds up the loss on the device. The device is synchronised at the two
    edges of a window and nowhere between.
    """

    def __init__(
        self,
        measure: MeasureConfig,
        device: torch.device,
        emit: Emit,
        clock: PhaseClock,
        group: Group | None = None,
    ) -> None:
        self._group = group or Group()
        self._warmup_steps = measure.warmup_steps
        self._device = device
        self._emit = emit
        self._clock = clock
        self._relay = LossRelay(device)
        self._watch = DivergenceWatch(measure.loss_spike)
        self._stepped_t = 0.0
        self._waited_seconds = 0.0
        self._forget_step()
        self._loss_is_a_share = False
        self.attention = AttentionKernels()
        self.scaler: Any = None
        """Trainer's GradScaler, or None."""
        self.on_stepped: Callable[[], None] = lambda: None
        """Called once, outside a window, after a step: before the first window, or behind it without a warm-up."""

    def watch(self, model: torch.nn.Module) -> None:
        """Register hooks on the model that Trainer will call."""
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    def _before_forward(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        counts = kwargs.pop("counts", None)
        if model.training and counts is not None:
            self._counts += counts
            # with num_items_in_batch a micro-batch's loss is its share of the step's, else it is a mean
            self._loss_is_a_share = kwargs.get("num_items_in_batch") is not None
            self.attention.watch_one()
        return args, kwargs

    def _after_forward(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if model.training and output.loss is not None:
            self.attention.over()
            self._loss += output.loss.detach()
            self._micro_batches += 1

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how long Trainer waited for the step's batches: since the step before it did nothing else."""
        self._waited_seconds = time.monotonic() - self._stepped_t

    def step_so_far(self) -> tuple[torch.Tensor, TokenCounts]:
        """Return the mean loss of the step's micro-batches, a scalar on the device, and their counts."""
        return self._mean_loss(), self._counts

    def replace_step(self, loss: torch.Tensor, counts: TokenCounts) -> None:
        """Take the loss and the counts of all workers instead of this one's."""
        self._loss, self._counts, self._micro_batches = loss, counts, 1

    def _mean_loss(self) -> torch.Tensor:
        return self._loss if self._loss_is_a_share else self._loss / max(1, self._micro_batches)

    def _forget_step(self) -> None:
        self._counts = TokenCounts()
        self._loss = torch.zeros((), device=self._device)
        self._micro_batches = 0

    def _begin(self) -> None:
        """Make ready for the first step."""
        if self.scaler is not None:
            self._relay = LossRelay(self._device, first_scale=self.scaler.get_scale())
        self._forget_step()
        self._clock.enter(Phase.warm_up)

    def _take_step(self, step: int, learning_rate: float | None = None) -> None:
        """Push the loss of the queued step."""
        # _scale is the tensor behind get_scale(), which would synchronise
        scale = None if self.scaler is None else self.scaler._scale
        self._relay.push(step, self._mean_loss(), self._counts, scale, self._waited_seconds, learning_rate)
        self._forget_step()

    def _open_window(self, after_step: int) -> None:
        self._settle()
        self._clock.enter(Phase.window)
        self._restart_clock()
        self._emit(WindowOpened(t=time.monotonic(), after_step=after_step))

    def _restart_clock(self) -> None:
        self._relay.restart_clock()

    def _close_window(self, after_step: int) -> None:
        self._synchronize()
        self._emit(WindowClosed(t=time.monotonic(), after_step=after_step))

    def _settle(self) -> None:
        """Wait until every step is done, and send it."""
        self._synchronize()
        self._send_through(None)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _send_arrived(self, step: int) -> None:
        """Send what has arrived behind a step. Of several workers each looks at the same losses behind the same step,
        so that all of them stop there for a spike."""
        self._send_through(step - _BEHIND if self._group.is_shared else None)

    def _send_through(self, through: int | None) -> None:
        """Send the steps whose loss has arrived.

        Args:
            through: as in LossRelay.arrived."""
        arrived = self._relay.arrived(through)
        for step in arrived:
            self._emit(step)
        for step in arrived:
            self._watch.see(step.step, step.loss)


class TelemetryCallback(Telemetry):
    """Watches the training of a measured window: warm-up, window, and steps that are only profiled."""

    def __init__(
        self,
        measure: MeasureConfig,
        device: torch.device,
        emit: Emit,
        clock: PhaseClock,
        group: Group | None = None,
    ) -> None:
        super().__init__(measure, device, emit, clock, group)
        self._last_step = measure.warmup_steps + measure.steps
        self._profiler = StepProfiler(measure.profile_steps if device.type == "cuda" and self._group.is_lead else 0)
        self._read_back_step = self._warmup_steps or self._last_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the warm-up, or open the window at once without one."""
        self._begin()
        if self._warmup_steps == 0:
            self._open_window(0)
        self._stepped_t = time.monotonic()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the learning rate to 0 in steps that are only profiled: the held-out loss is measured after them."""
        if state.global_step >= self._last_step:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push the loss of the queued step, and open or close the window."""
        if state.global_step > self._last_step:
            self._profile()
            return
        self._take_step(state.global_step)
        if state.global_step == self._last_step:
            self._close_window(self._last_step)
            self._group.end_steps()
        if state.global_step == 1 and self._warmup_steps:
            self._clock.leave(FIRST_STEP)
        if state.global_step == self._read_back_step:
            self.on_stepped()
        if self._clock.vram_limit is not None and state.global_step < self._warmup_steps:
            self._clock.vram_limit.apply()
        if state.global_step == self._warmup_steps:
            self._open_window(self._warmup_steps)
        if state.global_step == self._last_step:
            self._settle()
        else:
            self._send_arrived(state.global_step)
        if state.global_step == self._last_step and self._profiler.steps:
            self._clock.enter(Phase.profile)
            self._profiler.start()
        self._stepped_t = time.monotonic()

    def _profile(self) -> None:
        """Count one more step under the profiler."""
        profiled = self._profiler.stepped(self._counts.slots)
        self._counts = TokenCounts()
        if profiled is not None:
            self._emit(profiled)
        if self._profiler.fault:
            self._emit(Warned(t=time.monotonic(), text=f"the GPU's busy time is not known: {self._profiler.fault}"))
            self._profiler.fault = ""
