"""Measure the memory of many short trials on one card, next to what lora_lab.fit says of each.

    python -m benchmarks.fit_memory OUT [--seconds 530] [--at-once 6] [--have FILE ...] [--only WORD] [--rehearse]

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
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from benchmarks.fit_cases import COMMON, cases, edges
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.events import Compiled, Event, OptimizerMemory, PhaseMemory
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
_AGAIN = ("failed", "killed", "timed_out")


@dataclass(frozen=True, slots=True)
class Case:
    """A trial to run."""

    name: str
    config: TrialConfig
    said: Estimate
    is_alone: bool
    """Whether it must have the card to itself."""


def measure(config: TrialConfig, device: str) -> dict[str, Any]:
    """Run one trial in a worker, and return its end and its memory in bytes by phase."""
    placement = choose_placement(device)
    phases: dict[str, list[int | None]] = {}
    found: dict[str, Any] = {"phases": phases}

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

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        end = worker_process.run_workers(config, worker_environment(placement), Path(folder), note)
    found |= {"outcome": end.outcome.value, "reason": end.reason[:300], "seconds": round(time.monotonic() - began, 1)}
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
        "libraries": found.libraries,
        "low": found.low,
        "high": found.high,
        "unlike": list(found.errors.reasons),
    }


def planned(rehearse: bool, word: str) -> tuple[list[Case], dict[str, Any]]:
    """Return the trials to run, and by name why some cannot be."""
    listed = {f"tiny {n}": ["model=tiny", *COMMON, f"seq_len={n}"] for n in (32, 64)} if rehearse else cases()
    ready: list[Case] = []
    refused: dict[str, Any] = {}
    for name, overrides in [*listed.items(), *([] if rehearse else edges().items())]:
        if word not in name:
            continue
        try:
            config = compose(overrides)
            found = estimate(config, shapes_of(config.model))
        except InvalidInput as fault:
            refused[name] = {"outcome": "unsupported", "reason": str(fault)[:300]}
            continue
        if not name.startswith("edge"):
            ready.append(Case(name, config, found, is_alone=False))
            continue
        ready.append(Case(name, config, found, is_alone=True))
        for end, size in (("high", found.high), ("low", found.low)):
            limited = replace(config, vram_limit_gib=round(size / GIB, 3))
            ready.append(Case(f"{name} {end}", limited, found, is_alone=True))
    return ready, refused


class Run:
    """Runs trials until they are done or the time is over."""

    def __init__(self, out: Path, device: str, seconds: float, at_once: int, trials: dict[str, Any]) -> None:
        self._file, self._device = out / "fit_memory.json", device
        self._due, self._at_once = time.monotonic() + seconds, at_once
        placement = choose_placement(device)
        self._room = _ROOM * placement.cards[0].total_bytes if placement.cards else float("inf")
        self._content = {"origin": {**environment(), **device_facts(placement)}, "trials": trials}

    def go(self, waiting: list[Case]) -> None:
        """Run the trials: those that may share the card first, the others one after the other."""
        running: dict[Future[dict[str, Any]], Case] = {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._at_once, context) as pool:
            for alone in (False, True):
                left = [case for case in waiting if case.is_alone is alone]
                while left or running:
                    while (case := self._next(left, list(running.values()), 1 if alone else self._at_once)) is not None:
                        left.remove(case)
                        minutes = (self._due - time.monotonic()) / 60
                        future = pool.submit(measure, replace(case.config, timeout_minutes=minutes), self._device)
                        running[future] = case
                    if not running:
                        break  # no time, or nothing that is left fits
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._keep(running.pop(future), future)

    def left(self, waiting: Sequence[Case]) -> int:
        """Return how many of these trials have not run."""
        return sum(case.name not in self._content["trials"] for case in waiting)

    def _next(self, left: Sequence[Case], running: Sequence[Case], most: int) -> Case | None:
        if len(running) >= most or time.monotonic() > self._due - _LEAST_SECONDS:
            return None
        taken = sum(case.said.high + _LOADING_BYTES for case in running)
        return next((case for case in left if taken + case.said.high + _LOADING_BYTES <= self._room), None)

    def _keep(self, case: Case, future: Future[dict[str, Any]]) -> None:
        fault = future.exception()
        found = {"outcome": "failed", "reason": repr(fault)[:300]} if fault else future.result()
        self._content["trials"][case.name] = {**found, "alone": case.is_alone, "said": said(case.said)}
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
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--have", type=Path, nargs="*", default=[])
    parser.add_argument("--only", default="")
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    own = asked.out / "fit_memory.json"
    trials = earlier([*asked.have, *([own] if own.is_file() else [])])
    ready, refused = planned(asked.rehearse, asked.only)
    waiting = [case for case in ready if case.name not in trials]
    device = "cpu" if asked.rehearse else "auto"
    run = Run(asked.out, device, asked.seconds, 1 if asked.rehearse else asked.at_once, trials | refused)
    print(f"{len(waiting)} of {len(ready)} trials to run; {len(refused)} cannot be estimated", flush=True)
    run.go(waiting)
    print("all done" if run.left(waiting) == 0 else f"{run.left(waiting)} left: call again with --have", flush=True)


if __name__ == "__main__":
    main()
