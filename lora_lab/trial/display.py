"""Show a trial to the user, while it runs and when it is over."""

import statistics
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_lab import events as said
from lora_lab.events import Event, Phase
from lora_lab.outcome import End, Outcome
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.metrics import Metric, metric
from lora_lab.telemetry.sampler import SLOW_EVERY, Sampler
from lora_lab.trial.quality_rows import quality_rows
from lora_lab.trial.standing import clock, standing

_DOING = {
    Phase.start.value: "starting the worker",
    Phase.matmul_rate.value: "measuring the device's matrix products (first time only)",
    Phase.conversion.value: "converting the weights (first time only)",
    Phase.data.value: "reading and tokenising the rows",
    Phase.model.value: "loading the model",
    Phase.evaluation_before.value: "held-out loss before",
    Phase.compilation.value: "compiling the training step",
    Phase.warm_up.value: "warm-up",
    Phase.window.value: "measured window",
    Phase.evaluation.value: "held-out loss",
    Phase.checkpoint.value: "saving a checkpoint",
    Phase.profile.value: "profiling a few steps",
    Phase.evaluation_after.value: "held-out loss after",
    Phase.answers.value: "answering held-out prompts",
    Phase.saving.value: "saving the adapter",
}
_SWEEP = "sweep"
_QUIET_SECONDS = 5.0
"""How often a line is printed where no live bar can be drawn."""

_QUIET_SECONDS_IN_SWEEP = 60.0
"""The same in a sweep, which prints a line per trial anyway."""


class _TrialTimeLeft(TimeRemainingColumn):
    """Column with a trial's time left. It is empty for the sweep's bar, whose own text has the time left: the column
    cannot estimate from a few unequal steps."""

    def render(self, task: Task) -> Text:
        return Text() if task.description == _SWEEP else super().render(task)


class Display:
    """A live bar on a terminal, and a line now and then elsewhere."""

    def __init__(self, name: str, steps: int, sampler: Sampler, sweep: SweepFolder | None = None) -> None:
        """Prepare the bar.

        Args:
            steps: how many optimizer steps the trial takes.
            sweep: the sweep that the trial is part of; a second bar shows its progress.
        """
        self._console = Console(stderr=True)
        self._name = name
        self._quiet_seconds = _QUIET_SECONDS if sweep is None else _QUIET_SECONDS_IN_SWEEP
        self._sweep = sweep
        self._steps = steps
        self._sampler = sampler
        self._phase = Phase.start.value
        self._recent: list[said.Step] = []
        self._printed = 0.0
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            _TrialTimeLeft(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task(_DOING[self._phase], total=None, figures="")

    def __enter__(self) -> "Display":
        if self._sweep is None:
            self._console.print(f"[bold]{escape(self._name)}[/bold]", highlight=False)
        elif self._console.is_terminal:
            now = standing(self._sweep)
            left = "" if now.seconds_left is None else f"{clock(now.seconds_left)} left"
            figures = f"{now.done} of {now.total}  {left}  now: {self._name}"
            self._bar.add_task(_SWEEP, total=now.total, completed=now.done, figures=escape(figures))
        self._bar.start()
        self._printed = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, said.PhaseBegan):
            if (self._phase, event.phase) != (Phase.warm_up.value, Phase.window.value):
                self._bar.reset(self._task, total=None, figures="")
            self._phase = event.phase
            self._bar.update(self._task, description=_DOING[event.phase])
            self._line(force=True)
        elif isinstance(event, said.Progress):
            self._bar.update(self._task, completed=event.done, total=event.total)
        elif isinstance(event, said.Step):
            self._recent = [*self._recent[-9:], event]
            self._bar.update(self._task, completed=event.step, total=self._steps, figures=self._figures(event))
            self._line()
        elif isinstance(event, said.Warned) and self._sweep is None:  # a sweep shows them once, at its end
            self.warn(event.text)
        elif isinstance(event, said.Ready) and not event.prepared:
            self.warn("the server that forks workers could not import torch or a package built on it; starts are slow")

    def note(self, text: str) -> None:
        """Print what is waited for."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning above the bar."""
        self._console.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False)

    def _figures(self, step: said.Step) -> str:
        figures = [f"step {step.step}/{self._steps}", f"loss {step.loss:.3f}"]
        seconds = [s.seconds for s in self._recent if s.seconds is not None]
        if seconds:
            real = sum(s.real for s in self._recent if s.seconds is not None)
            figures.append(f"{real / sum(seconds):,.0f} tokens/s")
        last = self._sampler.samples[: -SLOW_EVERY - 1 : -1]
        used = next((sample.used_bytes for sample in last if sample.used_bytes is not None), None)
        watts = next((sample.average_watts for sample in last if sample.average_watts is not None), None)
        if used is not None:
            figures.append(f"{used / GIB:.1f} GiB")
        if watts is not None:
            figures.append(f"{watts:.0f} W")
        return "  ".join(figures)

    def _line(self, force: bool = False) -> None:
        """Print a line per phase and one every few seconds, where there is no terminal."""
        now = time.monotonic()
        force = force and self._sweep is None
        if self._console.is_terminal or not (force or now - self._printed > self._quiet_seconds):
            return
        self._printed = now
        figures = ""
        if self._recent and self._phase in (Phase.warm_up.value, Phase.window.value):
            seconds = [s.seconds for s in self._recent if s.seconds is not None]
            left = (self._steps - self._recent[-1].step) * statistics.median(seconds) if seconds else 0.0
            figures = f": {self._figures(self._recent[-1])}" + (f"  {left:.0f} s left" if left else "")
        which = "" if self._sweep is None else f"{self._name}: "
        self._console.print(f"  {escape(which)}{_DOING[self._phase]}{figures}", highlight=False, soft_wrap=True)


_WHERE_COMPILED = "engine/compile_seconds"
"""Shown only where something was compiled; most trials compile nothing."""

_SHOWN = tuple(
    metric(key)
    for key in (
        *("throughput/tokens_per_second", "throughput/seconds_per_10k_tokens", "throughput/step_seconds_p50"),
        *(_WHERE_COMPILED, "throughput/gpu_busy_share", "flops/mfu"),
        *("vram/peak_allocated_gib", "vram/peak_device_gib"),
        *("energy/joules_per_token", "energy/net_joules_per_token", "loss/eval_before", "loss/eval"),
    )
)
_ON_A_CARD = ("throughput/gpu_busy_share", "flops/mfu")
"""Shown only for trials on a card."""

_UNMISSED = (_WHERE_COMPILED, "throughput/seconds_per_10k_tokens", "energy/net_joules_per_token")
"""Absence of these is not shown: its reason is on the line before, or is not worth a line."""


def show_result(end: End, summary: Summary, stand_ins: list[str], places: list[str]) -> None:
    """Print the table at the end of a trial to standard output."""
    console = Console(file=sys.stdout)
    colour = "green" if end.outcome is Outcome.finished else "red"
    table = Table(title=f"[{colour}]{end.outcome.value}[/{colour}]", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    if end.reason:
        table.add_row("why", escape(end.reason))
    with_card = "vram/peak_device_gib" in summary.metrics
    for each in _SHOWN:
        if each.key in _ON_A_CARD and not with_card:
            continue
        if each.key in summary.metrics:
            table.add_row(each.title, f"{_with_error(summary, each)} {each.unit}{_remark(summary, each.key)}")
        elif each.key in summary.absent and each.key not in _UNMISSED:
            table.add_row(each.title, f"[dim]absent: {escape(summary.absent[each.key])}[/dim]")
    for title, text in quality_rows(summary):
        table.add_row(title, text)
    if summary.tags.get("validity") in ("invalid", "doubtful"):
        table.add_row(summary.tags["validity"], f"[yellow]{escape(summary.tags['validity_reasons'])}[/yellow]")
    for stand_in in stand_ins:
        table.add_row("stand-in", f"[yellow]{escape(stand_in)}[/yellow]")
    for warning in summary.warnings:
        table.add_row("warning", f"[yellow]{escape(warning)}[/yellow]")
    console.print(table)
    for place in places:
        console.print(f"  {place}", highlight=False, markup=False, soft_wrap=True)


def _with_error(summary: Summary, shown: Metric) -> str:
    error = summary.metrics.get(f"{shown.key}_error")
    text = shown.form.format(summary.metrics[shown.key])
    return text if error is None else f"{text} ± {shown.form.format(error)}"


def _remark(summary: Summary, name: str) -> str:
    if name == "throughput/gpu_busy_share":
        return f": {summary.tags['regime']}"
    if name == _WHERE_COMPILED:
        lengths = int(summary.metrics["engine/shapes"])
        return f" for {lengths} row length{'' if lengths == 1 else 's'}"
    if name == "energy/joules_per_token" and summary.tags["energy_source"] != "counter":
        return f", by {summary.tags['energy_source'].replace('_', ' ')}"
    return ""
