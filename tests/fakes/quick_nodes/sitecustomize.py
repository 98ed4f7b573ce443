"""
Makes the nodes of a Slurm cluster out of processes of this machine, and gives each a trial that only waits. Python
imports this at its start wherever this folder is on PYTHONPATH.

In a job each process has the host name of a node, so that other processes can judge it by its signs of life alone. What
a trial's worker would do is left out: it takes QUICK_SECONDS, and a few events say that it has trained. The file
QUICK_LOG gets a line when that begins and when it ends. The attempt QUICK_DIES is killed then. Everything else of the
trial is lora_lab's own.
"""

import json
import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NODES = 50


def run_workers(
    config: Any, environment: dict[str, str], folder: Path, on_event: Callable[[Any], None], *_: object
) -> Any:
    """Stand for lora_lab.trial.worker_process.run_workers."""
    from lora_lab.events import Ended, PhaseBegan, Ready, Step, WindowClosed, WindowOpened
    from lora_lab.outcome import end_said

    def now() -> float:
        return time.monotonic()

    log(folder.name, "begin")
    on_event(Ready(t=now(), pid=os.getpid(), prepared=True))
    on_event(PhaseBegan(t=now(), phase="window"))
    on_event(WindowOpened(t=now(), after_step=0))
    seconds = float(os.environ["QUICK_SECONDS"])
    for step in (1, 2, 3):
        time.sleep(seconds / 3)
        counts = {"rows": 1, "slots": 32, "real": 32, "trained": 31}
        on_event(Step(t=now(), step=step, seconds=seconds / 3, loss=3.0, skipped=False, **counts))
    on_event(WindowClosed(t=now(), after_step=3))
    last = Ended(t=now(), outcome="finished", reason="")
    on_event(last)
    log(folder.name, "end")
    if os.environ.get("QUICK_DIES") == folder.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return end_said(last)


def log(attempt: str, what: str) -> None:
    """Note a moment of an attempt; lines of several processes do not mix."""
    line = {"attempt": attempt, "job": os.environ["SLURM_JOB_ID"], "what": what, "t": time.monotonic()}
    with Path(os.environ["QUICK_LOG"]).open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


if "QUICK_LOG" in os.environ and "SLURM_JOB_ID" in os.environ:
    from lora_lab.trial import worker_process

    host = f"node{int(os.environ['SLURM_JOB_ID']) % NODES}"
    platform.node = lambda: host
    worker_process.run_workers = run_workers
    worker_process.prepare = lambda: None  # nobody asks for a worker
