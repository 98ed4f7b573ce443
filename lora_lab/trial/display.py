"""Show a trial to the user while it runs."""

import statistics
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from lora_lab import events as said
from lora_lab.config import TrialConfig
from lora_lab.events import Event
from lora_lab.job_events import Checkpointed, Resumed, Spiked
from lora_lab.phase import Phase
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.telemetry.figures import GIB
from lora_lab.telemetry.sampler import SLOW_EVERY, Sampler
from lora_lab.trial.job_progress import JobProgress, newest_watts
from lora_lab.trial.standing import clock, standing

_DOING = {
    Phase.start.value: "starting the worker",
    Phase.matmul_rate.value: "measuring the device's matrix products (first time only)",
    Phase.conversion.value: "converting the weights (first time only)",
    Phase.data.value: "reading and tokenising the rows",
    Phase.model.value: "loading the model",
    Phase.screening.value: "looking for rows that the model knows already",
    Phase.evaluation_before.value: "held-out loss before",
    Phase.compilation.value: "compiling the training step",
    Phase.warm_up.value: "warm-up",
    Phase.window.value: "measured window",
    Phase.evaluation.value: "evaluating",
    Phase.checkpoint.value: "saving a checkpoint",
    Phase.profile.value: "profiling a few steps",
    Phase.evaluation_after.value: "held-out loss after",
    Phase.answers.value: "answering held-out prompts",
    Phase.saving.value: "saving what was trained",
}
_OF_A_JOB = {Phase.warm_up.value, Phase.window.value, Phase.evaluation.value, Phase.checkpoint.value}
"""The phases between which a job alternates. They share one bar."""

_STANDS_OUT = {Spiked: "[bold red]spike:[/bold red] ", Resumed: "[yellow]resumed:[/yellow] "}
"""The beginning of a line about an event that is out of the ordinary."""

_SWEEP = "sweep"
_QUIET_SECONDS = 5.0
"""How often a line is printed where no live bar can be drawn."""

_QUIET_SECONDS_OF_LONG = 60.0
"""The same in a job, and in a sweep, which prints a line per trial anyway."""

_REFRESH_SECONDS = 0.1


class _TrialTimeLeft(TimeRemainingColumn):
    """Column with a trial's time left. It is empty for the bars of a sweep and of a job, whose own text has the time
    left: the column cannot estimate from a few unequal steps, nor does it know of evaluations."""

    def render(self, task: Task) -> Text:
        return Text() if task.description == _SWEEP or task.fields.get("below") else super().render(task)


class Bars(Progress):
    """Bars, each with a line of text below it where its task has one. Trials that run side by side share one."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            _TrialTimeLeft(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield each bar, and the line below it."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields.get("below"):
                yield Text(f"  {task.fields['below']}", no_wrap=True, overflow="ellipsis")


class Display:
    """A live bar on a terminal, and a line now and then elsewhere."""

    def __init__(
        self,
        name: str,
        config: TrialConfig,
        sampler: Sampler,
        sweep: SweepFolder | None = None,
        bars: Bars | None = None,
    ) -> None:
        """Prepare the bar.

        Args:
            sweep: the sweep that the trial is part of; a second bar shows its progress.
            bars: those of all trials that run side by side; whoever made them shows the sweep's progress.
        """
        self._console = Console(stderr=True) if bars is None else bars.console
        self._name = name
        is_job = config.train.is_job
        self._quiet_seconds = _QUIET_SECONDS if sweep is None and not is_job else _QUIET_SECONDS_OF_LONG
        self._sweep = sweep
        self._job = JobProgress(sampler.samples, config.measure.price_per_kwh) if is_job else None
        self._steps = config.measure.warmup_steps + config.measure.steps
        self._sampler = sampler
        self._phase = Phase.start.value
        self._recent: list[said.Step] = []
        self._first_rows: said.Progress | None = None
        """From where the rate of rows is counted."""
        self._printed = self._drawn = 0.0
        self._shares = bars is not None
        self._bar = bars or Bars(self._console)
        self._task: TaskID = self._bar.add_task(
            self._described(_DOING[self._phase]), total=None, visible=not self._shares, figures="", below=""
        )

    def __enter__(self) -> "Display":
        self._printed = time.monotonic()
        if self._shares:
            self._bar.update(self._task, visible=True)
            return self
        if self._sweep is None:
            self._console.print(f"[bold]{escape(self._name)}[/bold]", highlight=False)
        elif self._console.is_terminal:
            now = standing(self._sweep)
            left = "" if now.seconds_left is None else f"{clock(now.seconds_left)} left"
            figures = f"{now.done} of {now.total}  {left}  now: {self._name}"
            self._bar.add_task(_SWEEP, total=now.total, completed=now.done, figures=escape(figures))
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shares:
            self._bar.remove_task(self._task)
        else:
            self._bar.stop()

    def show(self, event: Event) -> None:
        """Take in one event."""
        if self._job is not None:
            self._job.see(event)
            self._tell(event, self._job.told(event))
        if isinstance(event, said.PhaseBegan):
            self._enter(event.phase)
        elif isinstance(event, said.Progress):
            self._advance(event)
        elif isinstance(event, said.Step) and self._job is not None:
            self._draw_job()
            self._line()
        elif isinstance(event, said.Step):
            self._recent = [*self._recent[-9:], event]
            self._bar.update(self._task, completed=event.step, total=self._steps, figures=self._figures(event))
            self._line()
        elif isinstance(event, said.DataCounted):
            if event.from_cache and self._sweep is None and self._phase == Phase.data.value:
                self.note(f"  the tokens of {event.rows_read:,} rows came from the cache")
        elif isinstance(event, said.Warned) and self._sweep is None:  # a sweep shows them once, at its end
            self.warn(event.text)
        elif isinstance(event, said.Ready) and not event.prepared:
            self.warn("the server that forks workers could not import torch or a package built on it; starts are slow")

    def note(self, text: str) -> None:
        """Print what is waited for."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning above the bar."""
        when = "" if self._job is None else f"{_now()} "
        self._console.print(f"[yellow]warning:[/yellow] {when}{escape(text)}", highlight=False, soft_wrap=True)

    @property
    def _in_job(self) -> bool:
        return self._job is not None and self._job.planned is not None and self._phase in _OF_A_JOB

    def _enter(self, phase: str) -> None:
        was_in_job, before = self._in_job, self._phase
        self._phase = phase
        stays = (was_in_job and self._in_job) or (before, phase) == (Phase.warm_up.value, Phase.window.value)
        if not stays:
            self._bar.reset(self._task, total=None, figures="", below="")
        self._bar.update(self._task, description=self._described(self._doing))
        if not self._in_job:
            self._line(force=True)

    @property
    def _doing(self) -> str:
        """Return the present phase in words."""
        return "training" if self._in_job and self._phase == Phase.window.value else _DOING[self._phase]

    def _described(self, doing: str) -> str:
        """Return what a trial does, with its name where bars of several trials are shown."""
        return f"{escape(self._name)}: {doing}" if self._shares else doing

    def _advance(self, event: said.Progress) -> None:
        if self._in_job:
            self._bar.update(self._task, description=self._described(f"{self._doing} {event.done}/{event.total}"))
            self._line()
        elif self._phase == Phase.data.value:
            self._show_rows(event)
        else:
            self._bar.update(self._task, completed=event.done, total=event.total)

    def _show_rows(self, event: said.Progress) -> None:
        """Show how far the rows are: read at first, when their number is not known, then tokenised."""
        first = self._first_rows
        if first is None or first.total != event.total:
            first = self._first_rows = event
        rate = (event.done - first.done) / (event.t - first.t) if event.t > first.t else 0.0
        figures = f"{event.done:,} of {event.total:,} rows" if event.total else f"{event.done:,} rows read"
        if rate:
            figures += f"  {rate:,.0f} rows/s"
        self._bar.update(self._task, completed=event.done, total=event.total or None, figures=figures)
        left = f"  {clock((event.total - event.done) / rate)} left" if rate and event.total else ""
        self._line(figures=f": {figures}{left}")

    def _draw_job(self) -> None:
        """Bring the job's bar up to date, at most ten times per second."""
        now = time.monotonic()
        if self._job is None or not self._console.is_terminal or now - self._drawn < _REFRESH_SECONDS:
            return
        self._drawn = now
        self._bar.update(
            self._task,
            completed=self._job.step,
            total=self._job.planned.steps if self._job.planned else None,
            figures="  ".join(filter(None, (self._job.place, self._job.left))),
            below="  ".join(self._job.figures()),
        )

    def _tell(self, event: Event, text: str) -> None:
        """Print what a user wants to know of an event of a job. What is out of the ordinary begins with its kind."""
        in_short = self._console.is_terminal or self._sweep is not None
        if not text or (in_short and isinstance(event, Checkpointed)):
            return
        which = "" if self._sweep is None else f"{escape(self._name)}: "
        kind = _STANDS_OUT.get(type(event))
        left = self._job.left if self._job is not None and kind is None else ""
        line = f"{kind or '  '}{_now()} {which}{escape(text)}" + (f"  {left}" if left else "")
        self._console.print(line, highlight=False, soft_wrap=True)
        self._printed = time.monotonic()

    def _figures(self, step: said.Step) -> str:
        figures = [f"step {step.step}/{self._steps}", f"loss {step.loss:.3f}"]
        seconds = [s.seconds for s in self._recent if s.seconds is not None]
        if seconds:
            real = sum(s.real for s in self._recent if s.seconds is not None)
            figures.append(f"{real / sum(seconds):,.0f} tokens/s")
        last = self._sampler.samples[: -SLOW_EVERY - 1 : -1]
        used = next((sample.used_bytes for sample in last if sample.used_bytes is not None), None)
        watts = newest_watts(self._sampler.samples)
        if used is not None:
            figures.append(f"{used / GIB:.1f} GiB")
        if watts is not None:
            figures.append(f"{watts:.0f} W")
        return "  ".join(figures)

    def _line(self, force: bool = False, figures: str = "") -> None:
        """Print a line per phase and one every few seconds, where there is no terminal."""
        now = time.monotonic()
        force = force and self._sweep is None
        if self._console.is_terminal or not (force or now - self._printed > self._quiet_seconds):
            return
        self._printed = now
        if self._job is not None and self._in_job:
            figures = ": " + "  ".join(filter(None, (self._job.place, *self._job.figures(), self._job.left)))
        elif self._recent and self._phase in (Phase.warm_up.value, Phase.window.value):
            seconds = [s.seconds for s in self._recent if s.seconds is not None]
            left = (self._steps - self._recent[-1].step) * statistics.median(seconds) if seconds else 0.0
            figures = f": {self._figures(self._recent[-1])}" + (f"  {left:.0f} s left" if left else "")
        when = "" if self._job is None else f"{_now()} "
        which = "" if self._sweep is None else f"{self._name}: "
        self._console.print(f"  {when}{escape(which)}{self._doing}{figures}", highlight=False, soft_wrap=True)


def _now() -> str:
    """Return the time of day."""
    return time.strftime("%H:%M:%S")
