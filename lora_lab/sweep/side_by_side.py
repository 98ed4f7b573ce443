"""Run the trials of a sweep side by side, one a slot, in threads of this process.

`submit` and `next_ended` are all that the order of a sweep needs of whoever runs its trials."""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from multiprocessing import Pipe
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Protocol

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from lora_lab.config import InvalidInput
from lora_lab.outcome import Outcome
from lora_lab.reading import Damaged
from lora_lab.store.folder_checks import leave_empty
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.sweep.slots import Slot
from lora_lab.trial.beside import Beside, Stays
from lora_lab.trial.display import Bars
from lora_lab.trial.interrupt import Interrupt, ctrl_c, reached_by
from lora_lab.trial.session import Request, run_session
from lora_lab.trial.standing import clock, standing


@dataclass(frozen=True, slots=True)
class Job:
    """A trial for Hydra's launcher."""

    block: int
    """The number of its block."""
    overrides: list[str]


def launch_side_by_side(
    context: HydraContext, task: Callable[..., Any], config: DictConfig, runner: "Runner", jobs: Sequence[Job]
) -> list[str]:
    """Compose trials as Hydra does, and run them several at a time.

    Args:
        task: `job` in lora_lab/__main__.py.
        config: as the sweeper has it.
        runner: runs them.

    Returns: what lora_lab itself failed with, a line for each trial that it failed in.

    Raises: KeyboardInterrupt on Ctrl-C, after all trials that run were ended and recorded."""
    composed: list[Request] = []

    def note(request: Request) -> Outcome:
        composed.append(request)
        return Outcome.finished

    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=partial(task, run=note), config=config
    )

    def prepare(job: Job) -> Request | None:
        composed.clear()
        broken.extend(failures(launcher.launch([job.overrides], initial_job_idx=jobs.index(job))))
        return composed[0] if composed else None  # a refusal was printed

    broken: list[str] = []
    with runner:
        run_in_blocks(runner, jobs, prepare)
    return broken + runner.broken


def failures(returned: Sequence[JobReturn]) -> list[str]:
    """Return what lora_lab itself failed with in these jobs, a line each."""
    return [f"{job._return_value!r}" for job in returned if job.status is JobStatus.FAILED]


class Runner(Protocol):
    """Whoever runs trials, several at a time. Use it in a `with` block in the main thread, which takes Ctrl-C."""

    broken: list[str]
    """What was not run as it should have been, a line for each trial."""

    def __enter__(self) -> "Runner": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def free(self) -> int:
        """Return how many trials may be submitted now."""
        ...

    @property
    def running(self) -> int:
        """Return how many trials run."""
        ...

    def submit(self, request: Request) -> None:
        """Begin a trial; at least one slot has to be free.

        Raises: KeyboardInterrupt as `next_ended` does."""
        ...

    def next_ended(self) -> None:
        """Wait until one more trial has ended.

        Raises: KeyboardInterrupt on Ctrl-C, after all trials that run were ended and recorded."""
        ...


def run_in_blocks(runner: Runner, jobs: Sequence[Job], prepare: Callable[[Job], Request | None]) -> None:
    """Run blocks of trials one after the other, each in its order. A slot that is free takes the next trial. A block
    begins when all slots are free: their idle power is measured then.

    Args:
        prepare: returns None where there is nothing to run.

    Raises: KeyboardInterrupt."""
    for _, block in groupby(jobs, key=lambda job: job.block):
        for job in block:
            request = prepare(job)
            if request is None:
                continue
            try:
                while not runner.free:
                    runner.next_ended()
                runner.submit(request)
            except KeyboardInterrupt:
                leave_empty(request.folder)  # Hydra has made it
                raise
        while runner.running:
            runner.next_ended()


class Threads:
    """A runner with a thread for each trial. Use it in a `with` block in the main thread, which takes Ctrl-C."""

    def __init__(self, slots: Sequence[Slot], sweep: SweepFolder) -> None:
        self.broken: list[str] = []
        """What lora_lab itself failed with, a line for each trial that it failed in."""
        self._free = list(slots)
        self._sweep = sweep
        self._threads: dict[str, tuple[threading.Thread, Slot]] = {}
        self._stays = Stays()
        self._interrupt = Interrupt()
        self._ended, self._ends = Pipe(duplex=False)
        self._sending = threading.Lock()
        self._console = Console(stderr=True)
        self._bars = Bars(self._console)
        self._of_sweep = self._bars.add_task("sweep", total=None, figures="", below="")
        self._ctrl_c = ctrl_c()

    @property
    def free(self) -> int:
        """Return the number of free slots."""
        return len(self._free)

    @property
    def running(self) -> int:
        """Return the number of trials that run."""
        return len(self._threads)

    def __enter__(self) -> "Threads":
        self._pressed = self._ctrl_c.__enter__()
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end_all()  # none runs, unless this process's own code failed
        finally:
            self._bars.stop()
            self._ctrl_c.__exit__(kind, error, trace)

    def submit(self, request: Request) -> None:
        """Begin a trial on a slot that is free.

        Raises: KeyboardInterrupt as `next_ended` does."""
        self._heed(wait([self._pressed], 0))
        slot, name = self._free.pop(0), request.folder.name
        self._stays.begin(name, slot.name)
        beside = Beside(
            slot=slot.name, placement=slot.placement, bars=self._bars, others=lambda: self._stays.others(name)
        )
        thread = threading.Thread(target=self._run, args=(replace(request, beside=beside),), name=f"trial {name}")
        self._threads[name] = thread, slot
        thread.start()
        self._show()

    def next_ended(self) -> None:
        """Wait until one more trial has ended, and free its slot.

        Raises: KeyboardInterrupt on Ctrl-C, after all trials that run were ended and recorded."""
        self._heed(wait([self._ended, self._pressed]))
        self._free_slot()

    def _heed(self, ready: Sequence[object]) -> None:
        if self._pressed in ready:
            self._end_all()
            raise KeyboardInterrupt

    def _end_all(self) -> None:
        if self._threads:
            self._interrupt.pass_on()
        while self._threads:
            self._free_slot()

    def _free_slot(self) -> None:
        thread, slot = self._threads.pop(self._ended.recv())
        thread.join()
        self._free.append(slot)

    def _run(self, request: Request) -> None:
        """Run one trial in this thread, whatever becomes of it."""
        name = request.folder.name
        try:
            with reached_by(self._interrupt):
                run_session(request)
        except KeyboardInterrupt:
            pass  # it is recorded, and the main thread ends the sweep
        except (InvalidInput, Damaged) as refusal:
            print(f"Refused, nothing was trained:\n{refusal}", file=sys.stderr)
            leave_empty(request.folder)
        except Exception as error:  # broad: the trials on other slots go on
            self.broken.append(f"{name}: {error!r}")
        finally:
            self._stays.end(name)
            with self._sending:
                self._ends.send(name)

    def _show(self) -> None:
        """Show how far the sweep is and what runs on each slot, when a trial begins."""
        runs = sorted(self._stays.now().items())
        if not self._console.is_terminal:
            said = "; ".join(f"{slot}: {self._named(trial)}" for slot, trial in runs)
            self._console.print(f"  now on {escape(said)}", highlight=False, soft_wrap=True)
            return
        now = standing(self._sweep)
        left = "" if now.seconds_left is None else f"{clock(now.seconds_left)} left"
        figures = f"{now.done} of {now.total}  {left}"
        self._bars.update(self._of_sweep, total=now.total, completed=now.done, figures=figures)

    def _named(self, trial: str) -> str:
        planned = self._sweep.read().planned(trial)
        return trial if planned is None else f"{trial} ({planned.name})"
