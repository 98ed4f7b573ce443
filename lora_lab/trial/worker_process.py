"""Start the worker processes, receive their events, and handle their death."""

import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from lora_lab.config import TrialConfig
from lora_lab.cotrain import Member
from lora_lab.events import Ended, Event, PhaseMemory, Ready, Warned, decode, encode
from lora_lab.look import Look
from lora_lab.options import Isolation
from lora_lab.outcome import End, Outcome, end_of, end_said, says_out_of_memory
from lora_lab.seat import Attendance, Seat, seats
from lora_lab.secrets import clean
from lora_lab.trial import forkserver
from lora_lab.trial.interrupt import ctrl_c
from lora_lab.trial.variables import without_launchers

_GRACE_SECONDS = 5.0
"""Time for a worker to exit by itself after SIGTERM."""

_LEAVING_SECONDS = 30.0
"""Time for a worker to exit after its last event: CUDA and its files must be closed."""

_LOOK_AGAIN_SECONDS = 1.0
"""How often it is looked whether a worker of a group hangs."""

LOOK_SECONDS = 600.0
"""Time to check one point's rows and model: they may have to be downloaded and tokenised."""

_OF_ALL = (Outcome.finished, Outcome.timed_out, Outcome.diverged, Outcome.refused, Outcome.unsupported)
"""Outcomes that are no single worker's."""

_RANKED = (Ready, PhaseMemory, Warned, Ended)
"""Events that each worker of a group sends for itself."""

prepare = forkserver.prepare


def run_workers(
    config: TrialConfig,
    environment: dict[str, str],
    folder: Path,
    on_event: Callable[[Event], None],
    world_size: int = 1,
    members: Sequence[Member] = (),
) -> End:
    """Run one trial in workers of its own, or in this process with isolation=inline.

    Args:
        environment: variables of the workers besides this process's. Of several workers each sees one of the cards
            that CUDA_VISIBLE_DEVICES names.
        folder: where the lead worker writes its log and its adapter.
        on_event: called with each event in order, while the workers run.
        world_size: how many workers.
        members: the trials that train together in one worker; none for a trial alone.

    Returns: how the trial ended, also when a worker could not report it.

    Raises: KeyboardInterrupt after the workers were ended.
    """
    if config.isolation is Isolation.inline:
        return _run_inline(config, environment, folder, on_event)
    with seats(world_size) as places:
        return WorkerGroup(config, environment, folder, places, members).run(on_event)


class _Worker:
    """One process of a group, not yet started."""

    def __init__(
        self,
        seat: Seat,
        config: TrialConfig,
        environment: dict[str, str],
        folder: Path,
        members: Sequence[Member] = (),
    ) -> None:
        from lora_lab.worker import process

        self.rank = seat.rank
        self.log = seat.log(folder)
        self.log.parent.mkdir(exist_ok=True)
        self.receiver, self.sender = multiprocessing.Pipe(duplex=False)
        arguments = (self.sender, config, environment, folder, seat, members)
        self.process = forkserver.context.Process(target=process.main, args=arguments, name="lora_lab worker")
        self.spoke = False
        self.begun = False
        """Whether it has begun the trial, with torch imported."""

    def hear(self) -> Event | None:
        """Return the next event, with this worker's rank where the event has one; None when the worker is gone."""
        try:
            event = decode(self.receiver.recv_bytes())
        except (EOFError, OSError):
            return None
        self.spoke = True
        self.begun = self.begun or not isinstance(event, Ready)
        return replace(event, rank=self.rank) if isinstance(event, _RANKED) and self.rank else event


class WorkerGroup:
    """The workers of one trial. They start together, send one stream of events, and end together.

    The lead (rank 0) reports for the trial. Of the other workers only events that have a rank are passed on. A worker
    that fails or dies ends the group, and the others are ended too."""

    def __init__(
        self,
        config: TrialConfig,
        environment: dict[str, str],
        folder: Path,
        places: list[Seat],
        members: Sequence[Member] = (),
    ) -> None:
        self._minutes = config.timeout_minutes
        self._workers = []
        for seat in places:
            own = environment | _own_card(environment, seat)
            self._workers.append(_Worker(seat, config, own, folder, members))
        meeting = places[0].meeting
        self._attendance = None if meeting is None else Attendance(meeting, len(places))

    def run(self, on_event: Callable[[Event], None]) -> End:
        """Start the workers and return how the trial ended; none is left running.

        Raises: KeyboardInterrupt."""
        try:
            with ctrl_c() as interrupt:
                for worker in self._workers:
                    with worker.sender:
                        missing = forkserver.start(worker.process, interrupt, forkserver.ANSWER_SECONDS)
                    if missing:
                        return End(outcome=Outcome.failed, reason=missing)
                last, end = self._hear(interrupt, on_event)
            if end is None or end.outcome is not Outcome.timed_out:
                # it has sent its last event, or is gone already
                last.process.join(_LEAVING_SECONDS if len(self._workers) == 1 else _GRACE_SECONDS)
        finally:
            self._stop()
        return self._named(last, end or _end_of_silence(last.process.exitcode, last.log, last.begun))

    def _hear(self, interrupt: Connection, on_event: Callable[[Event], None]) -> tuple[_Worker, End | None]:
        """Pass on events until the trial's end is known.

        Returns: the worker that decided it, and the end that it reported; None when it exited without a report.

        Raises: KeyboardInterrupt when Ctrl-C was pressed.
        """
        lead, end = self._workers[0], None
        began = time.monotonic()
        due = math.inf if self._minutes is None else began + self._minutes * 60
        left = {worker.receiver: worker for worker in self._workers}
        while left:
            silent = next((worker for worker in left.values() if not worker.spoke), None)
            first_word = began + forkserver.ANSWER_SECONDS if silent else math.inf
            seconds = min(due, first_word) - time.monotonic()
            # also when events come without a pause
            ready = _ready([*left], interrupt, min(seconds, self._look_seconds)) if seconds > 0 else []
            if absent := self._absent():
                absent.process.kill()
                why = "the worker hangs: the others waited for it, and it did not come to its next step"
                return absent, End(outcome=Outcome.failed, reason=why)
            if not ready and seconds > self._look_seconds:
                continue
            if not ready and end is not None:
                break  # the lead has ended, and the others took too long to exit
            if not ready and silent and first_word < due:
                why = f"the worker did not begin within {forkserver.ANSWER_SECONDS:g} s"
                return silent, End(outcome=Outcome.failed, reason=why)
            if not ready:
                return lead, End(outcome=Outcome.timed_out, reason=f"not done within timeout_minutes={self._minutes:g}")
            for worker in [left[receiver] for receiver in ready]:
                event = worker.hear()
                if event is None:
                    return worker, None
                if worker is lead or isinstance(event, _RANKED):
                    on_event(event)
                if not isinstance(event, Ended):
                    continue
                said = end_said(event)
                # all workers see the same losses, and the lead alone says what they mean
                if said.outcome is not Outcome.finished and (worker is lead or said.outcome is not Outcome.diverged):
                    return worker, said
                del left[worker.receiver]
                if worker is lead:
                    end, due = said, min(due, time.monotonic() + _LEAVING_SECONDS)
        return lead, end

    def _named(self, worker: _Worker, end: End) -> End:
        """Add the worker's rank to the reason, where the group has several workers."""
        if len(self._workers) == 1 or end.outcome in _OF_ALL:
            return end
        return replace(end, reason=f"rank {worker.rank}: {end.reason}")

    @property
    def _look_seconds(self) -> float:
        return math.inf if self._attendance is None else _LOOK_AGAIN_SECONDS

    def _absent(self) -> _Worker | None:
        """Return a worker that the others wait for in vain."""
        absent = [] if self._attendance is None else self._attendance.absent()
        return self._workers[absent[0]] if absent else None

    def _stop(self) -> None:
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.terminate()  # all of them first: the grace is not one after the other
        for worker in self._workers:
            _stop(worker.process, _GRACE_SECONDS)
            worker.receiver.close()
            worker.sender.close()


def _own_card(environment: dict[str, str], seat: Seat) -> dict[str, str]:
    """Return the variable that shows one of several workers its card alone: Trainer would use all that it sees. Nothing
    for a single worker, or without cards."""
    cards = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": cards[seat.rank]} if seat.world_size > 1 and cards != [""] else {}


def check_trials(
    configs: list[TrialConfig],
    log: Path,
    seen: Callable[[int], None],
    works: bool = False,
    seconds: float = LOOK_SECONDS,
) -> tuple[list[Look], str]:
    """Check trials before they run, in a worker.

    Args:
        log: gets what the worker prints.
        seen: called with the number of trials checked so far.
        works: whether to count each trial's work, too.
        seconds: how long one check may take.

    Returns: the result for each trial, empty where the worker did not reach it (the trial itself then reports its
        faults). And empty, or why the worker did not reach all.

    Raises: KeyboardInterrupt.
    """
    from lora_lab.worker import process

    receiver, sender = multiprocessing.Pipe(duplex=False)
    worker = forkserver.context.Process(target=process.check, args=(sender, configs, log, works), name="lora_lab check")
    looks: list[Look] = []
    why = ""
    try:
        with ctrl_c() as interrupt:
            with sender:
                why = forkserver.start(worker, interrupt, forkserver.ANSWER_SECONDS)
            while not why and len(looks) < len(configs):
                if not _says_something(receiver, interrupt, seconds):
                    why = f"the check of the points did not answer within {seconds:g} s"
                    break
                looks.append(receiver.recv())
                seen(len(looks))
    except (EOFError, OSError):
        why = f"the check of the points ended early; see {log}"
    finally:
        _stop(worker, 0.0)
        receiver.close()
        clean(log)
    return looks + [Look()] * (len(configs) - len(looks)), why


def _says_something(receiver: Connection, interrupt: Connection, seconds: float) -> bool:
    """Wait until the worker sends something or exits; return False when it was silent for `seconds`.

    Raises: KeyboardInterrupt when Ctrl-C was pressed."""
    return bool(_ready([receiver], interrupt, seconds))


def _ready(receivers: list[Connection], interrupt: Connection, seconds: float) -> list[Connection]:
    """Wait for `seconds` and return the receivers with something to read; a worker's end counts too.

    Raises: KeyboardInterrupt when Ctrl-C was pressed."""
    ready = wait([*receivers, interrupt], None if seconds == math.inf else seconds)
    if interrupt in ready:
        raise KeyboardInterrupt
    return [receiver for receiver in receivers if receiver in ready]


def _stop(worker: ForkServerProcess, grace_seconds: float) -> None:
    """End a worker: SIGTERM, a wait, SIGKILL. Does nothing when it has exited or was never started."""
    if worker.pid is None or worker.exitcode is not None:
        return
    worker.terminate()
    if not wait([worker.sentinel], grace_seconds):
        worker.kill()
    worker.join(_GRACE_SECONDS)
    if worker.exitcode is None:  # the server reports how its workers ended, so it hangs
        forkserver.end_server()
        worker.join()


def _end_of_silence(exit_code: int | None, log: Path, begun: bool) -> End:
    """Return the end of a worker that exited without a last event.

    Args:
        begun: whether it had begun its trial, with torch imported.
    """
    last = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.is_file() else ""
    # bitsandbytes exits when CUDA refuses memory; a Rust library aborts
    if exit_code in (1, -signal.SIGABRT) and says_out_of_memory(last):
        return End(outcome=Outcome.out_of_memory, reason=f"a library ended the worker; see {log}")
    by_signal = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else ""
    if not begun and by_signal not in (signal.SIGKILL.name, signal.SIGTERM.name):
        how = by_signal or f"exit code {exit_code}"
        why = next((line.strip()[:300] for line in reversed(last.splitlines()) if line.strip()), "its log says nothing")
        return End(
            outcome=Outcome.failed,
            reason=f"torch, or a package built on it, could not be imported: {why} ({how}; see {log})",
        )
    if by_signal:
        hint = "; on Linux that is also how the kernel ends a process when memory runs out" if exit_code == -9 else ""
        return End(outcome=Outcome.killed, reason=f"the worker was ended by {by_signal}{hint}")
    return End(outcome=Outcome.failed, reason=f"the worker left with exit code {exit_code}; see {log}")


def _run_inline(
    config: TrialConfig, environment: dict[str, str], folder: Path, on_event: Callable[[Event], None]
) -> End:
    last: Event | None = None

    def emit(event: Event) -> None:
        nonlocal last
        last = decode(encode(event))  # as it would arrive from a process
        on_event(last)

    with forkserver.changed_environment({**without_launchers(), **environment}):
        try:
            from lora_lab.worker.trial import run_trial
        except (ImportError, OSError, RuntimeError) as error:
            return end_of(error)
        run_trial(config, folder, emit)
    assert isinstance(last, Ended)
    return end_said(last)
