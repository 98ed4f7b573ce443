"""The controller's side of a contender's process: start it, ask it, survive its death."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.plan import Setup, Turn
from lora_lab.outcome import Outcome, says_out_of_memory

_ROOT = Path(__file__).resolve().parents[2]
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
"""No stack asks a hub for anything or tells it anything."""
_LOG_TAIL = 3000
"""Characters of a dead process's log that are kept."""


def environment(scratch: Path, shown: dict[str, str]) -> dict[str, str]:
    """Return the environment of a child: offline, the one card, and what it compiles kept in `scratch`."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    compiled = {
        "UNSLOTH_COMPILE_LOCATION": str(scratch / "unsloth_compiled_cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
    return {**os.environ, **_OFFLINE, **shown, **compiled, "PYTHONPATH": os.pathsep.join(paths)}


class Contender:
    """One contender's process, from its start to its end."""

    def __init__(self, setup: Setup, scratch: Path, shown: dict[str, str]) -> None:
        self.name = setup.contender
        # its own caches: nobody's compilation is shortened by another's
        own = Path(tempfile.mkdtemp(prefix=f"{setup.cell}-{setup.contender}-", dir=scratch))
        self._log = own / "log"
        ours, theirs = multiprocessing.Pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.contender", str(theirs.fileno())],
                env=environment(own, shown),
                cwd=own,  # some stacks leave folders where they stand
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        theirs.close()
        self._pipe = ours
        self._send(setup)

    def _send(self, message: Setup | Turn) -> None:
        try:
            self._pipe.send(message)
        except OSError:  # it has died, and the answer will say so
            return

    def loaded(self, timeout: float) -> dict[str, Any]:
        """Return the answer to its Setup, at most `timeout` seconds after this call."""
        return self._answer("load", timeout)

    def take(self, turn: Turn, timeout: float) -> dict[str, Any]:
        """Return the answer to a turn, at most `timeout` seconds later."""
        self._send(turn)
        return self._answer("turn", timeout)

    def _answer(self, phase: str, timeout: float) -> dict[str, Any]:
        """Return what it says. A process that is silent or gone is an answer too, and is ended."""
        try:
            if self._pipe.poll(timeout):
                said: dict[str, Any] = self._pipe.recv()
                return said if said["outcome"] == Outcome.finished.value else {**said, "phase": phase}
            outcome, reason = Outcome.timed_out, f"no answer within {timeout:g} s"
        except (EOFError, OSError):
            code = self._process.wait()
            out_of_memory = says_out_of_memory(self._tail())
            outcome = Outcome.out_of_memory if out_of_memory else Outcome.killed
            reason = f"its process ended with {code}"
        return {"outcome": outcome.value, "reason": reason, "phase": phase, "log": self._tail()}

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]

    def stop(self) -> None:
        """End the process and wait until it is gone, and its memory with it."""
        self._pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
