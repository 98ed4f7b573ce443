"""Run the trials of a sweep on the nodes of a cluster.

The sweep's folder is all that this process and the nodes share. A node runs a trial as this machine would, and writes
its record. This process decides what runs and in which order, and delivers the records to the store. Each attempt has a
ticket, a file that either a node takes to run it, or this process to prevent that: so that no attempt is run twice."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

from lora_lab.config import InvalidInput
from lora_lab.files import write_text
from lora_lab.options import ClusterKind
from lora_lab.outcome import End, Outcome
from lora_lab.places_config import ClusterConfig
from lora_lab.reading import Damaged, text_of
from lora_lab.store import heartbeat
from lora_lab.store.claim import claim
from lora_lab.store.finishing import finish_for_dead
from lora_lab.store.outbox import Outbox
from lora_lab.store.record import Record
from lora_lab.store.sweep_folder import Planned, SweepFolder
from lora_lab.store.trial_folder import MANIFEST, TrialFolder
from lora_lab.sweep.cluster.asking import POLL_SECONDS
from lora_lab.sweep.cluster.engine import Engine, NotSubmitted
from lora_lab.sweep.cluster.node import Told, run_trial, take, taken_by
from lora_lab.telemetry.figures import Summary
from lora_lab.trial.interrupt import ctrl_c
from lora_lab.trial.session import ENDED_BY_CLUSTER, Request
from lora_lab.trial.standing import show_line

MOST_ATTEMPTS = 3
"""How many times one start of a sweep runs a trial that the cluster ends, or whose node is lost."""

_MINUTES_TO_RECORD = 2.0
"""A trial ends by itself this long before the cluster would end it, so that its record says timed_out."""

_VISIBLE_SECONDS = 90.0
"""How long a record that a node has written may take until it is seen here."""

_ENDING_SECONDS = 60.0
"""How long trials that are ended may take to record what they have measured."""


def jobs_folder(sweep: SweepFolder) -> Path:
    """Return the folder with what the jobs of a sweep are made from, and their logs."""
    return sweep.path / "cluster"


def _ticket(sweep: SweepFolder, name: str) -> Path:
    return jobs_folder(sweep) / f"{name}.ticket"


def _job_file(sweep: SweepFolder, name: str) -> Path:
    return jobs_folder(sweep) / f"{name}.job"


def take_back(sweep: SweepFolder, trials: Sequence[Planned]) -> None:
    """Take back what an earlier start has submitted to a cluster, before this machine runs these trials itself.

    Raises: InvalidInput when a node still runs one of them."""
    for trial in trials:
        latest = sweep.latest_attempt(trial)
        if latest is None or not _job_file(sweep, latest).exists() or sweep.over(latest) is not None:
            continue
        if not take(_ticket(sweep, latest)) and _is_alive(sweep, latest):
            job = _job_of(sweep, latest)
            raise InvalidInput(
                f"a node still runs {latest} ({job or 'a job'}) for an earlier start of the sweep in {sweep.path}. Add "
                f"cluster={job.partition(' ')[0] or 'slurm'} to wait for it, or end that job first."
            )


def attempt_to_run(sweep: SweepFolder, trial: Planned, engine: Engine) -> str:
    """Return the name of the attempt at a trial that is to be run: the one that an earlier start has begun, if a node
    still runs it, or a new one. An attempt that waits for a node since then is taken back."""
    latest = sweep.latest_attempt(trial)
    if latest is None or not _job_file(sweep, latest).exists() or sweep.over(latest) is not None:
        return sweep.next_attempt(trial)
    job = _job_of(sweep, latest)
    if take(_ticket(sweep, latest)):
        _cancel(engine, job)
        return sweep.next_attempt(trial)
    refused = job and engine.is_over(job) and not (sweep.path / latest / MANIFEST).exists()
    return latest if _is_alive(sweep, latest) and not refused else sweep.next_attempt(trial)


def _cancel(engine: Engine, job: str) -> None:
    """End a job whose name is known."""
    if job:
        engine.cancel(job)


def _job_of(sweep: SweepFolder, name: str) -> str:
    """Return the job of an attempt, as the cluster calls it; empty where its name was not noted."""
    return (text_of(_job_file(sweep, name)) or "").strip()


def _is_alive(sweep: SweepFolder, name: str) -> bool:
    """Return whether a node has begun an attempt and still works on it."""
    with contextlib.suppress(Damaged):
        owner = taken_by(_ticket(sweep, name))
        return owner is not None and not heartbeat.gone(owner, sweep.path / name)
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    request: Request
    job: str
    number: int
    """Which attempt of this start it is, from 1."""

    @property
    def name(self) -> str:
        return self.request.folder.name


class Nodes:
    """A runner with a job for each trial. Use it in a `with` block in the main thread, which takes Ctrl-C."""

    def __init__(
        self, engine: Engine, asked: ClusterConfig, sweep: SweepFolder, device: Mapping[str, str], store: Outbox
    ) -> None:
        self.broken: list[str] = []
        """What the cluster did not take or could not run, a line for each trial."""
        self._engine = engine
        self._asked = asked
        self._sweep = sweep
        self._device = dict(device)
        self._store = store
        self._running: dict[str, _Run] = {}
        self._delivering = ThreadPoolExecutor(1, thread_name_prefix="delivers")
        """Delivers records one after the other: a node that is free does not wait until the store has answered."""
        self._over: dict[str, float] = {}
        """When a job was first seen to be over, by the name of its attempt."""
        self._ctrl_c = ctrl_c()

    @property
    def free(self) -> int:
        """Return how many trials may be submitted now."""
        return self._asked.workers - len(self._running)

    @property
    def running(self) -> int:
        """Return the number of trials that were submitted and are not over."""
        return len(self._running)

    def __enter__(self) -> "Nodes":
        jobs_folder(self._sweep).mkdir(exist_ok=True)
        self._pressed = self._ctrl_c.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end_all()  # none runs, unless this process's own code failed
            self._delivering.shutdown()
        finally:
            self._ctrl_c.__exit__(kind, error, trace)

    def submit(self, request: Request) -> None:
        """Submit a trial, or wait for it where a node runs it already, for an earlier start.

        Raises: KeyboardInterrupt as `next_ended` does."""
        self._heed(0)
        name = request.folder.name
        if _is_alive(self._sweep, name):
            self._note(_Run(request=request, job=_job_of(self._sweep, name), number=1))
            return
        config = request.config
        if self._asked.kind is ClusterKind.slurm:
            limit = self._asked.minutes - _MINUTES_TO_RECORD
            config = replace(config, timeout_minutes=min(config.timeout_minutes or limit, limit))
        self._start(replace(request, config=config, cluster=self._asked.kind.name), 1)

    def next_ended(self) -> None:
        """Wait until one more trial has ended. A trial that was lost is submitted again.

        Raises: KeyboardInterrupt on Ctrl-C, after all trials that run were ended and recorded."""
        while (over := next(filter(self._is_over, self._running.values()), None)) is None:
            self._heed(POLL_SECONDS)
        self._end(over)

    def _heed(self, seconds: float) -> None:
        if wait([self._pressed], seconds):
            self._end_all()
            raise KeyboardInterrupt

    def _end_all(self) -> None:
        for run in [*self._running.values()]:
            _cancel(self._engine, run.job)
            if take(_ticket(self._sweep, run.name)):  # no node had begun it
                del self._running[run.name]
        due = time.monotonic() + _ENDING_SECONDS
        while self._running and time.monotonic() < due:
            for run in [*self._running.values()]:
                if self._is_over(run):
                    self._end(run, again=False)
            time.sleep(POLL_SECONDS)
        for run in self._running.values():
            print(f"{run.job} has not ended yet; the next start records {run.name}", file=sys.stderr)
        self._running.clear()

    def _start(self, request: Request, number: int) -> None:
        name = request.folder.name
        ticket, noted = _ticket(self._sweep, name), _job_file(self._sweep, name)
        try:
            ticket.unlink(missing_ok=True)  # of an attempt before, where a job goes on in its folder
            write_text(noted, "")  # now a later start knows that a node may take the ticket
            job = self._engine.start(run_trial, request, ticket, self._device)
            write_text(noted, f"{job}\n")
        except (NotSubmitted, OSError) as error:
            self.broken.append(f"{name}: {error}")
            return
        self._note(_Run(request=request, job=job, number=number))

    def _note(self, run: _Run) -> None:
        self._running[run.name] = run
        member = run.request.member
        print(f"  {run.job}: {run.name} ({member.name if member else ''})", file=sys.stderr, flush=True)

    def _is_over(self, run: _Run) -> bool:
        if self._engine.is_over(run.job) if run.job else self._sweep.over(run.name) is not None:
            return self._is_settled(run)
        if not _ticket(self._sweep, run.name).exists():
            return False  # it waits for a node
        return not _is_alive(self._sweep, run.name)

    def _is_settled(self, run: _Run) -> bool:
        """Return whether a job that is over leaves nothing to wait for. A network file system may hide a record for a
        while, and a job that was started twice may run on where Slurm does not reach its node."""
        told = self._engine.told(run.job) if run.job else None
        if not isinstance(told, Told) or told.refused or not told.has_record:
            return True
        trial = TrialFolder(run.request.folder)
        with contextlib.suppress(Damaged):
            if trial.manifest() is None or trial.record() is not None:
                return True
            owner = taken_by(_ticket(self._sweep, run.name))
            if owner is not None and owner.is_here:
                return owner.gone
            with contextlib.suppress(OSError):
                trial.path.chmod(trial.path.stat().st_mode)  # has the client ask the server
            waited = time.monotonic() - self._over.setdefault(run.name, time.monotonic())
            return waited > _VISIBLE_SECONDS and not heartbeat.beats(trial.path, _VISIBLE_SECONDS)
        return True

    def _end(self, run: _Run, again: bool = True) -> None:
        """Record and show a trial that is over, and have it delivered.

        Args:
            again: whether a trial that was lost is submitted once more."""
        del self._running[run.name]
        told = self._engine.told(run.job) if run.job else None
        if isinstance(told, Told) and told.refused:
            print(f"Refused, nothing was trained:\n{told.refused}", file=sys.stderr)
            return
        trial = TrialFolder(run.request.folder)
        try:
            record = trial.record()
            reason = "" if record is None else record.tags.get("reason", "")
            lost = reason if reason.startswith(ENDED_BY_CLUSTER) else ""
            if record is None:
                lost = told.lost if isinstance(told, Told) and told.lost else self._last_words(run)
                record = _record_of_lost(trial)
        except Damaged as damaged:
            print(f"warning: {damaged}", file=sys.stderr)
            return
        if lost:
            _cancel(self._engine, run.job)  # the cluster may still think that it runs, or start it once more
            print(f"  {run.job}: {run.name}: {lost}", file=sys.stderr)
        if record is not None:
            self._show(trial, record)
            delivery = self._delivering.submit(self._deliver, trial, record)
            if lost:
                delivery.result()  # a job goes on in its folder
        if record is not None and record.outcome != Outcome.killed.value:
            return  # all was measured when it was lost
        if lost and again and run.number < MOST_ATTEMPTS:
            self._start(self._next(run), run.number + 1)
        elif lost and again and record is None:
            self.broken.append(f"{run.name}: {lost}")

    def _last_words(self, run: _Run) -> str:
        log = self._engine.log(run.job) if run.job else ""
        return f"its node was lost{': ' if log else ''}{log}"

    def _show(self, trial: TrialFolder, record: Record) -> None:
        summary = Summary()
        attempt = self._sweep.over(trial.path.name)
        if attempt is not None:
            summary.metrics = attempt.metrics
        end = End(outcome=Outcome(record.outcome), reason=record.tags.get("reason", ""))
        show_line(self._sweep, record, end, summary)

    def _deliver(self, trial: TrialFolder, record: Record) -> None:
        try:
            if self._store.deliver_trial(trial, record) is None:
                print(f"warning: {self._store.outlook('the record')}", file=sys.stderr)
        except Exception as error:  # broad: the others are delivered all the same
            self.broken.append(f"{trial.path.name}: {error!r}")

    def _next(self, run: _Run) -> Request:
        """Return the request for one more attempt at a trial, and note its folder in the plan."""
        plan = self._sweep.read()
        planned = plan.planned(run.name)
        assert planned is not None
        name = self._sweep.next_attempt(planned)
        folder = self._sweep.path / name
        folder.mkdir(exist_ok=True)
        plan.launched = [name if each == run.name else each for each in plan.launched]
        with contextlib.suppress(OSError):
            self._sweep.write(plan)
        return replace(run.request, folder=folder, resumed=TrialFolder(folder).manifest())


def _record_of_lost(trial: TrialFolder) -> Record | None:
    """Make the record of a trial whose node is gone; None when the trial had not begun.

    Raises: Damaged."""
    asked = trial.manifest()
    if asked is None:
        return None
    with claim(trial.path, seconds=10.0):
        return trial.record() or finish_for_dead(trial, asked)
