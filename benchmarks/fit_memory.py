"""Measure the memory of many short trials on one card, next to what lora_lab.fit says of each.

    python -m benchmarks.fit_memory OUT [--seconds 530] [--at-once 12] [--have FILE ...] [--only WORD] [--rehearse]

Writes OUT/fit_memory.json after every trial. A later call goes on with what earlier files (--have) do not have; one
that failed is tried again. Trials run several at a time, each in a worker of its own, as long as their estimates
together fit the card: torch's allocator counts for each process by itself. What torch does not see is read for trials
that ran alone: the last ones. These are the edges: the same trial within an emulated capacity at the upper end of its
interval, where it has to finish, and at the lower end, where it has to run out of memory. --rehearse runs two trials of
the tiny model on the CPU.
"""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from benchmarks.fit_cases import COMMON, cases, edges, held_out
from lora_lab.config import TrialConfig
from lora_lab.events import Compiled, Event, OptimizerMemory, PhaseMemory, Ran, Step, WindowOpened
from lora_lab.files import write_json
from lora_lab.fit.estimate import GIB, Estimate, estimate
from lora_lab.fit.shapes import shapes_of
from lora_lab.store.environment import device_facts, environment
from lora_lab.trial import worker_process
from lora_lab.trial.devices import choose_placement, worker_environment

_ROOM = 0.92
"""The share of the card that the estimates of trials at the same time may take."""
_LEAST_SECONDS = 45.0
"""No trial begins with less time left."""
_LOADING_BYTES = GIB
"""What a trial may need besides its estimate, for the contexts of libraries while it loads."""
_OF_AN_EDGE = 3
"""Trials of each edge, see planned_edges."""
_AGAIN = ("failed", "killed", "timed_out")


@dataclass(frozen=True, slots=True)
class Case:
    """A trial to run."""

    name: str
    config: TrialConfig
    said: Estimate


def measure(config: TrialConfig, device: str) -> dict[str, Any]:
    """Run one trial in a worker, and return its end and its memory in bytes by phase."""
    placement = choose_placement(device)
    phases: dict[str, list[int | None]] = {}
    found: dict[str, Any] = {"phases": phases}
    measured: list[Step] = []
    opened: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, PhaseMemory):
            phases[event.phase] = [
                event.peak_allocated_bytes,
                event.peak_reserved_bytes,
                event.reserved_bytes,
                event.device_used_bytes,
                event.retries,
            ]
        elif isinstance(event, OptimizerMemory):
            found["optimizer"] = [event.total_bytes, event.eligible_bytes, event.paged_bytes]
        elif isinstance(event, Compiled):
            found["working_bytes"] = event.working_bytes
        elif isinstance(event, WindowOpened):
            opened.append(event.after_step)
        elif isinstance(event, Step) and opened and event.step > opened[0] and event.seconds is not None:
            measured.append(event)
        elif isinstance(event, Ran):
            found["segments"] = event.facts.get("segments")

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        end = worker_process.run_workers(config, worker_environment(placement), Path(folder), note)
    found |= {"outcome": end.outcome.value, "reason": end.reason[:300], "seconds": round(time.monotonic() - began, 1)}
    if measured:
        found["tokens_per_second"] = sum(step.real for step in measured) / sum(step.seconds or 0 for step in measured)
    if end.asked_bytes is not None:
        found["asked_bytes"] = end.asked_bytes
    return found


def said(found: Estimate) -> dict[str, Any]:
    """Return an estimate as it is stored, in bytes."""
    return {
        "parts": found.parts,
        "optimizer": asdict(found.optimizer),
        "allocated": found.allocated,
        "reserved": found.reserved,
        "least": found.least,
        "libraries": found.libraries.size,
        "low": found.low,
        "enough": found.enough,
        "high": found.high,
        "unlike": list(found.errors.reasons),
    }


def planned(listed: dict[str, list[str]]) -> Iterator[Case]:
    """Yield trials with their estimates; composing takes a while, and is done while others run."""
    for name, overrides in listed.items():
        config = compose(overrides)
        yield Case(name, config, estimate(config, shapes_of(config.model)))


def planned_edges(listed: dict[str, list[str]]) -> Iterator[Case]:
    """Yield each trial on the whole card, and within an emulated capacity at each end of its interval."""
    for case in planned(listed):
        yield case
        for end, size in (("enough", case.said.enough), ("low", case.said.low)):
            limited = replace(case.config, vram_limit_gib=round(size / GIB, 3))
            yield replace(case, name=f"{case.name} {end}", config=limited)


class Run:
    """Runs trials until they are done or the time is over."""

    def __init__(self, file: Path, device: str, seconds: float, trials: dict[str, Any], **more: Any) -> None:
        self._file, self._device = file, device
        self._due = time.monotonic() + seconds
        placement = choose_placement(device)
        self._room = _ROOM * placement.cards[0].total_bytes if placement.cards else float("inf")
        facts = {**environment(), **device_facts(placement)}
        facts["commit"] = os.environ.get("LORA_LAB_COMMIT", facts["commit"])  # where only the files are
        self._content = {"origin": facts, "trials": trials, **more}

    def go(self, planned: Iterator[Case], at_once: int) -> None:
        """Run the trials that are not done, a limited number at a time, until the time is over."""
        running: dict[Future[dict[str, Any]], Case] = {}
        fresh = (case for case in planned if case.name not in self._content["trials"])
        waiting: list[Case] = []
        with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:
            while True:
                waiting += islice(fresh, 2 * at_once - len(waiting)) if self._has_time() else ()
                while len(running) < at_once and (case := self._next(waiting, list(running.values()))) is not None:
                    waiting.remove(case)
                    minutes = (self._due - time.monotonic()) / 60
                    future = pool.submit(measure, replace(case.config, timeout_minutes=minutes), self._device)
                    running[future] = case
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._keep(running.pop(future), future, is_alone=at_once == 1)

    def _has_time(self) -> bool:
        return time.monotonic() < self._due - _LEAST_SECONDS

    def _next(self, waiting: Sequence[Case], running: Sequence[Case]) -> Case | None:
        if not self._has_time():
            return None
        taken = sum(case.said.high + _LOADING_BYTES for case in running)
        return next((case for case in waiting if taken + case.said.high + _LOADING_BYTES <= self._room), None)

    def _keep(self, case: Case, future: Future[dict[str, Any]], is_alone: bool) -> None:
        fault = future.exception()
        found = {"outcome": "failed", "reason": repr(fault)[:300]} if fault else future.result()
        commit = self._content["origin"]["commit"]
        self._content["trials"][case.name] = {**found, "alone": is_alone, "said": said(case.said), "commit": commit}
        write_json(self._file, self._content)
        line = f"{found['outcome']:14s} {case.name}"
        peak = max((memory[0] or 0 for memory in found.get("phases", {}).values()), default=0)
        figures = f" allocated {peak / GIB:.2f} GiB, said {case.said.allocated / GIB:.2f}" if peak else ""
        print(line + figures, found["reason"][:120], flush=True)


def earlier(files: Sequence[Path]) -> dict[str, Any]:
    """Return the trials of earlier files that need not run again."""
    trials: dict[str, Any] = {}
    for file in files:
        trials |= json.loads(file.read_text(encoding="utf-8"))["trials"]
    return {name: trial for name, trial in trials.items() if trial["outcome"] not in _AGAIN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=530.0)
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--have", type=Path, nargs="*", default=[])
    parser.add_argument("--only", default="", help="a regular expression: trials whose names have a match")
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    own = asked.out / "fit_memory.json"
    trials = earlier([*asked.have, *([own] if own.is_file() else [])])
    if asked.rehearse:
        tiny = {f"tiny {length}": ["model=tiny", *COMMON, f"seq_len={length}"] for length in (32, 64)}
        Run(own, "cpu", asked.seconds, trials).go(planned(tiny), at_once=1)
        return
    kept = (cases() | held_out(), edges())
    shared, alone = ({k: v for k, v in listed.items() if re.search(asked.only, k)} for listed in kept)
    run = Run(own, "auto", asked.seconds, trials)
    run.go(planned(shared), asked.at_once)
    run.go(planned_edges(alone), at_once=1)
    print(
        f"{len(trials)} of {len(shared) + _OF_AN_EDGE * len(alone)} are done; if some are left, call again with --have"
    )


if __name__ == "__main__":
    main()
