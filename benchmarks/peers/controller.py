"""The controller: one cell after the other, in each the contenders in turns. Imports no torch."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.plan import OTHER_KERNEL, Cell, Setup, Turn, applies, missing_packages
from benchmarks.peers.processes import Contender, environment
from lora_lab.outcome import Outcome

FINISHED = Outcome.finished.value
FIRST_WARMUP = 5
"""So many further warm-up steps in a contender's first turn of a cell: it compiles and captures there."""
MOST_STEPS = 400
"""No window is longer, however short the steps."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How the cells of one call are run."""

    contenders: Sequence[str]
    method: str
    model: str
    rounds: int
    steps: int
    """Optimizer steps in a window, at least."""
    warmup: int
    window_seconds: float
    """After a contender's first turn, windows have as many steps as make this long (the energy counter is coarse)."""
    load_timeout: float
    """Seconds for a contender to be ready."""
    turn_timeout: float
    """Seconds for a turn; twice that for the first one."""

    @property
    def compared(self) -> int:
        """First steps of every turn whose losses are compared."""
        return self.warmup + self.steps


def make_material(folder: Path, model: str, scratch: Path, shown: dict[str, str]) -> None:
    """Weights, tokenizer and adapters into `folder`, unless it has them."""
    if (folder / "made").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.peers.material", str(folder), model]
    done = subprocess.run(
        command, env=environment(scratch, shown), cwd=scratch, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (folder / "made").touch()  # last: a kill leaves no half of it to be taken for all


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
        """What came of each contender: outcome, turns, versions. A failed one is left out from then on.

        Every cell has fresh processes: what one shape compiled, cached or left fragmented is no other shape's
        start, and a profiled process is slower afterwards. They load side by side.
        """
        beside = [name for name in self._settings.contenders if name != OTHER_KERNEL]
        running = self._ready([name for name in beside if applies(name, self._cell)])
        try:
            for number in range(self._settings.rounds):
                for contender in list(running):
                    if not self._take(contender, number):
                        running.remove(contender)
                        contender.stop()
        finally:
            for contender in running:
                contender.stop()
        self._alone()
        return self._results

    def _ready(self, names: Sequence[str]) -> list[Contender]:
        """The contenders that could be loaded."""
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

    def _take(self, contender: Contender, number: int) -> bool:
        """One turn of one contender; says whether it goes on."""
        result = self._results[contender.name]
        first = number == 0
        turn = Turn(
            warmup=self._settings.warmup + (FIRST_WARMUP if first else 0),
            steps=window_steps(result["turns"], self._settings.steps, self._settings.window_seconds),
            compared=self._settings.compared,
            profiled=number == self._settings.rounds - 1,
        )
        answer = contender.take(turn, self._settings.turn_timeout * (2 if first else 1))
        if answer["outcome"] != FINISHED:
            self._lose(contender.name, {**answer, "round": number})
            return False
        result["turns"].append({"round": number, **answer})
        memory = f"  {answer['peak_allocated_gib']:.2f} GiB" if "peak_allocated_gib" in answer else ""
        speed = f"{answer['tokens_per_second']:,.0f} tokens/s  {answer['step_seconds_median'] * 1e3:.1f} ms/step"
        self._say(f"{self._cell} round {number + 1} {contender.name}: {speed}{memory}")
        return True

    def _lose(self, name: str, answer: dict[str, Any]) -> None:
        self._results[name] |= answer
        self._say(f"{self._cell} {name}: {answer['outcome']}, {answer['reason']}")

    def _alone(self) -> None:
        """Turns outside the rounds, each with the card to itself, when the others' processes are gone."""
        for name, result in list(self._results.items()):
            if result["outcome"] == Outcome.out_of_memory.value:  # was it the models that waited beside it?
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
        """One turn in a fresh process."""
        settings = self._settings
        contender = self._start(name)
        try:
            answer = contender.loaded(settings.load_timeout)
            if answer["outcome"] == FINISHED:
                turn = Turn(settings.warmup + FIRST_WARMUP, settings.steps, settings.compared, profiled=False)
                answer = contender.take(turn, 2 * settings.turn_timeout)
        finally:
            contender.stop()
        return answer


def window_steps(turns: Sequence[dict[str, Any]], least: int, seconds: float) -> int:
    """Steps of the next window: as many as make `seconds` long by the turn before, `least` at least."""
    if not turns:
        return least
    step: float = turns[-1]["step_seconds_median"]
    return max(least, min(MOST_STEPS, math.ceil(seconds / step)))
