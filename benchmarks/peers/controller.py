"""The controller: one cell after the other, in each the contenders in turns. Imports no torch."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.order import order
from benchmarks.peers.plan import MADE, OTHER_KERNEL, PROFILED_STEPS, Cell, Setup, Turn, applies, missing_packages
from benchmarks.peers.processes import Contender, environment
from lora_lab.outcome import Outcome

FINISHED = Outcome.finished.value
FIRST_WARMUP = 3
"""More warm-up steps in a contender's first turn of a cell: it compiles and captures there."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How the cells of one call are run."""

    contenders: Sequence[str]
    method: str
    model: str
    rounds: int
    least: int
    """Optimizer steps in a window, at least."""
    warmup: int
    window_seconds: float
    load_timeout: float
    """Seconds for a contender to be ready."""
    turn_timeout: float
    """Seconds for a turn; twice that for the first one."""
    deadline: float = float("inf")
    """The monotonic clock's time after which no round should end."""

    @property
    def compared(self) -> int:
        """First steps of every turn whose losses are compared."""
        return self.warmup + self.least

    def turn(self, first: bool, last: bool) -> Turn:
        """Return a contender's first, last or any other turn."""
        return Turn(
            warmup=self.warmup + (FIRST_WARMUP if first else 0),
            least=self.least,
            seconds=self.window_seconds,
            compared=self.compared,
            profiled=PROFILED_STEPS if last else 0,
        )


def make_material(folder: Path, model: str, scratch: Path, shown: dict[str, str]) -> None:
    """Make weights, tokenizer and adapters in `folder`, unless it has them."""
    if (folder / MADE).is_file():
        return
    command = [sys.executable, "-m", "benchmarks.peers.material", str(folder), model]
    done = subprocess.run(
        command, env=environment(scratch, shown), cwd=scratch, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


class Race:
    """The contenders of one cell, taking turns."""

    def __init__(
        self, cell: Cell, settings: Settings, material: Path, scratch: Path, shown: dict[str, str], say: Say
    ) -> None:
        self._cell = cell
        self._settings = settings
        self._material = material
        self._scratch = scratch
        self._shown = shown
        self._say = say
        self._results: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, dict[str, Any]]:
        """Return what came of each contender: outcome, turns, versions. A failed one is left out from then on.

        Every cell has fresh processes: what one shape compiled, cached or left fragmented is not where another
        starts, and a profiled process is slower afterwards. They load at the same time.
        """
        paired = [name for name in self._settings.contenders if name != OTHER_KERNEL]
        running = self._ready([name for name in paired if applies(name, self._cell, self._settings.method)])
        try:
            took = 0.0
            for number in range(self._settings.rounds):
                begun = time.monotonic()
                # another round after this one would not end in time, so this is the last
                last = number == self._settings.rounds - 1 or begun + 2 * took > self._settings.deadline
                for place, contender in enumerate(order(running, number)):
                    if not self._take(contender, number, place, last):
                        running.remove(contender)
                        contender.stop()
                took = time.monotonic() - begun
                if last:
                    break
        finally:
            for contender in running:
                contender.stop()
        self._alone()
        return self._results

    def _ready(self, names: Sequence[str]) -> list[Contender]:
        """Return the contenders that could be loaded."""
        started = []
        for name in names:
            missing = missing_packages(name, self._settings.method)
            self._results[name] = {"outcome": FINISHED, "turns": []}
            if missing:
                self._lose(name, {"outcome": "missing_package", "reason": f"not installed: {', '.join(missing)}"})
                continue
            started.append(self._start(name))
        ready = []
        for contender in started:
            answer = contender.loaded(self._settings.load_timeout)
            if answer["outcome"] == FINISHED:
                self._results[contender.name] |= {k: v for k, v in answer.items() if k != "outcome"}
                ready.append(contender)
            else:
                self._lose(contender.name, answer)
                contender.stop()
        return ready

    def _start(self, name: str) -> Contender:
        setup = Setup(name, self._cell, self._settings.method, str(self._material))
        return Contender(setup, self._scratch, self._shown)

    def _take(self, contender: Contender, number: int, place: int, last: bool) -> bool:
        """Take one turn of one contender; return whether it goes on."""
        first = number == 0
        timeout = self._settings.turn_timeout * (2 if first else 1)
        answer = contender.take(self._settings.turn(first, last), timeout)
        if answer["outcome"] != FINISHED:
            self._lose(contender.name, {**answer, "round": number})
            return False
        self._results[contender.name]["turns"].append({"round": number, "place": place, **answer})
        memory = f"  {answer['peak_allocated_gib']:.2f} GiB" if "peak_allocated_gib" in answer else ""
        speed = f"{answer['tokens_per_second']:,.0f} tokens/s  {answer['step_seconds_median'] * 1e3:.1f} ms/step"
        self._say(f"{self._cell} round {number + 1} {contender.name}: {speed}{memory}")
        return True

    def _lose(self, name: str, answer: dict[str, Any]) -> None:
        self._results[name] |= answer
        self._say(f"{self._cell} {name}: {answer['outcome']}, {answer['reason']}")

    def _alone(self) -> None:
        """Take turns outside the rounds, each with the card to itself, when the others' processes are gone."""
        for name, result in list(self._results.items()):
            if result["outcome"] == Outcome.out_of_memory.value:  # was it the models that waited meanwhile?
                result["alone"] = self._take_alone(name)
                self._say(f"{self._cell} {name} alone: {result['alone']['outcome']}")
        if OTHER_KERNEL in self._settings.contenders:
            self._results[OTHER_KERNEL] = {"outcome": FINISHED, "turns": []}
            answer = self._take_alone(OTHER_KERNEL)
            if answer["outcome"] == FINISHED:
                self._results[OTHER_KERNEL]["turns"].append({"round": 0, **answer})
            else:
                self._lose(OTHER_KERNEL, answer)

    def _take_alone(self, name: str) -> dict[str, Any]:
        """Take one turn in a fresh process."""
        settings = self._settings
        contender = self._start(name)
        try:
            answer = contender.loaded(settings.load_timeout)
            if answer["outcome"] == FINISHED:
                answer = contender.take(settings.turn(first=True, last=True), 2 * settings.turn_timeout)
        finally:
            contender.stop()
        return answer
