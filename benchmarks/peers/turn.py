"""One turn of a contender, in its process: a whole Trainer.train() from the shared adapters, and what was measured."""

import gc
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.peers.material import InOrder, restart_adapters
from benchmarks.peers.plan import SHORTEST_ENERGY_SECONDS, Turn
from benchmarks.peers.stacks import Built, Job
from lora_lab.telemetry.nvml import Card, visible_cards
from lora_lab.worker.data import IGNORED, Example
from lora_lab.worker.profiling import StepProfiler

GIB = 2**30
TICK_SECONDS = 0.1
"""NVML's energy counter moves this often."""


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Stamps the steps of a turn and ends it: synchronised at the first step and the window's two edges only.

    The host's clock says when the window is long enough, so a host that runs ahead of the card makes it longer.
    """

    def __init__(
        self, turn: Turn, tokens_of: Callable[[int], int], card: Card | None, unseen_peak_bytes: Callable[[], int]
    ) -> None:
        """Args:
        tokens_of: real tokens in a step, by its number from 0.
        """
        self._turn = turn
        self._tokens_of = tokens_of
        self._card = card
        self._unseen_peak_bytes = unseen_peak_bytes
        self._begun = 0.0
        self._opened = 0.0
        self._joules: float | None = None
        self._marks: list[Any] = []
        self._profiler = StepProfiler(turn.profiled) if turn.profiled and card else None
        self._closed = False
        self.found: dict[str, Any] = {}
        """Every figure, with its unit in its name."""

    def begin(self) -> None:
        """Call before Trainer.train(): what is compiled and captured comes after this."""
        self._synchronise()
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take note of a step that has been queued."""
        done = state.global_step
        if done == 1:
            self._synchronise()
            self.found["first_step_seconds"] = time.perf_counter() - self._begun
        if self._closed:
            control.should_training_stop = self._profiled()
            return
        if done == self._turn.warmup:
            self._open()
        if done >= self._turn.warmup:
            self._marks.append(self._mark())
        if done > self._turn.warmup:
            steps = done - self._turn.warmup
            if self._turn.enough(steps, time.perf_counter() - self._opened):
                self._close(steps)
                control.should_training_stop = self._profiler is None

    def _open(self) -> None:
        self._synchronise()
        if self._card:
            torch.cuda.reset_peak_memory_stats()
        self._joules = self._energy()
        self._opened = time.perf_counter()

    def _close(self, steps: int) -> None:
        self._closed = True
        self._synchronise()
        seconds = time.perf_counter() - self._opened
        joules = self._energy()
        tokens = sum(self._tokens_of(self._turn.warmup + step) for step in range(steps))
        each = self._step_seconds()
        self.found |= {
            "window_seconds": seconds,
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": each,
            "step_seconds_median": statistics.median(each),
        }
        self.found |= energy(self._joules, joules, seconds, tokens)
        if self._card:
            peak = max(torch.cuda.max_memory_allocated(), self._unseen_peak_bytes())
            self.found["peak_allocated_gib"] = peak / GIB
            self.found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        if self._profiler:
            self._profiler.start()

    def _profiled(self) -> bool:
        """Take note of a profiled step; return whether it was the last one."""
        assert self._profiler is not None
        seen = self._profiler.stepped(0)
        if seen:
            each = {"kernel_seconds": seen.busy_seconds / seen.steps, "kernels": seen.kernels / seen.steps}
            self.found |= {**each, "profiled_steps": seen.steps}
        elif self._profiler.fault:
            self.found["profiler_fault"] = self._profiler.fault
        return bool(seen or self._profiler.fault)

    def _energy(self) -> float | None:
        """Return the card's counter in joules; the device is idle while it is read."""
        return self._card.sample(slow=False).energy_joules if self._card else None

    def _mark(self) -> Any:
        if not self._card:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _step_seconds(self) -> list[float]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._card:
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]

    def _synchronise(self) -> None:
        if self._card:
            torch.cuda.synchronize()


def energy(before: float | None, after: float | None, seconds: float, tokens: int) -> dict[str, Any]:
    """Return J per token over a window and how coarse the counter makes it; without a figure, the reason."""
    if before is None or after is None:
        return {"energy_absent": "no counter of total energy"}
    if seconds < SHORTEST_ENERGY_SECONDS:
        why = f"the window took {seconds:.2f} s, less than {SHORTEST_ENERGY_SECONDS:g} s of a counter that ticks"
        return {"energy_absent": f"{why} every {TICK_SECONDS:g} s"}
    return {"joules_per_token": (after - before) / tokens, "energy_resolution_percent": 100 * TICK_SECONDS / seconds}


class Ledger:
    """Keeps loss and trained tokens of the first steps on the device: nothing is read before the turn is over."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._losses: list[Tensor] = []
        self._labels: list[Tensor] = []

    def watch(self, trainer: Any) -> None:
        """Come between Trainer's loop and its training_step, whatever engine is behind that."""
        step = trainer.training_step

        def watched(model: Any, inputs: Any, *more: Any, **named: Any) -> Tensor:
            if len(self._labels) < self._steps:
                self._labels.append(inputs["labels"].clone())
            loss: Tensor = step(model, inputs, *more, **named)
            if len(self._losses) < self._steps:
                self._losses.append(loss.detach().clone())  # an engine may use the same buffer again
            return loss

        trainer.training_step = watched

    def read(self) -> dict[str, Any]:
        """Return losses in nats per token, and a digest of the tokens that they are over, without padding."""
        sha = hashlib.sha256()
        for labels in self._labels:
            trained = labels[labels != IGNORED]
            sha.update(trained.to("cpu", torch.int64).contiguous().numpy().tobytes())
        return {"losses": [float(loss) for loss in self._losses], "rows_sha256": sha.hexdigest()[:16]}


def run_turn(
    built: Built, turn: Turn, rows: Sequence[Example], batch_size: int, first: dict[str, Tensor]
) -> dict[str, Any]:
    """Train from the shared adapters over `rows` and return what was measured; the memory is given back.

    Args:
        first: the adapters' first values.
    """
    card = _card()
    forward = built.model.__dict__.get("forward")
    found: dict[str, Any] = {}
    try:
        found["trained"] = restart_adapters(built.model, first)
        if card:
            found["free_gib_before"] = torch.cuda.mem_get_info()[0] / GIB
        found |= _train(built, turn, rows, batch_size, card)
    finally:
        _give_back(built, forward, card)
    if card:
        found["held_gib"] = torch.cuda.memory_reserved() / GIB
    return found


def _train(built: Built, turn: Turn, rows: Sequence[Example], batch_size: int, card: Card | None) -> dict[str, Any]:
    """Train once. Everything that hangs on the Trainer ends with this function."""

    def tokens_of(step: int) -> int:
        return sum(len(rows[(step * batch_size + i) % len(rows)].ids) for i in range(batch_size))

    watch, ledger = Stopwatch(turn, tokens_of, card, built.unseen_peak_bytes), Ledger(turn.compared)
    shaped = [built.as_row(row) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(InOrder(shaped, turn.most * batch_size), turn.most, watch, folder)
        trainer = built.make_trainer(job)
        ledger.watch(trainer)
        watch.begin()
        trainer.train()
    return watch.found | ledger.read()


def _give_back(built: Built, forward: Any, card: Card | None) -> None:
    """Undo the autocast wrapper that Trainer puts around `forward`, and free what training took.

    Without the mark that accelerate leaves, the next Trainer wraps it again; with it, turns would differ.
    """
    model = built.model
    for left_behind in ("_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(left_behind, None)
    if forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.forward = forward
    model.zero_grad(set_to_none=True)
    built.release()
    gc.collect()
    if card:
        torch.cuda.empty_cache()


def _card() -> Card | None:
    """Return the one card that this process is shown."""
    return visible_cards()[0] if torch.cuda.is_available() else None
