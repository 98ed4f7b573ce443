"""A sweep whose workers wait, on a cluster whose nodes are processes of this machine."""

import contextlib
import json
import os
import signal
from collections import Counter
from pathlib import Path

from command_server import ADDRESS
from conftest import FAKES, SERVER, records_in

from lora_lab.sweep.cluster.node import taken_by

FAST = ("model=tiny", "measure=quick", "method=lora", "precision=fp32", "seq_len=32", "data=random_tokens")
ON_CPU = ("device=cpu", "share_device=true")  # the nodes are one machine, whose CPU has a lock
SWEEP = ("-m", *FAST, "data.rows=16", "learning_rate=1e-4,2e-4,3e-4", *ON_CPU, "cluster.workers=2")
RATES = ("0.0001", "0.0002", "0.0003")


def fork_jobs() -> None:
    """Have the jobs begin quickly, also in a run of one file of tests alone."""
    if ADDRESS not in os.environ and SERVER._socket is None:
        SERVER.share()
        SERVER.environment = {**SERVER.environment, ADDRESS: os.environ[ADDRESS]}


def waiting(folder: Path, *rates: str) -> dict[str, str]:
    """The variables with which the workers of these learning rates wait after their second step."""
    (folder / "sabotage.json").write_text(json.dumps({rate: ["wait", "after step 2"] for rate in rates}))
    path = os.pathsep.join([str(FAKES / "saboteur"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "SABOTAGE": str(folder / "sabotage.json")}


def release(folder: Path) -> None:
    """Let workers that wait go on."""
    (folder / "sabotage.json").write_text("{}")


def in_step_2(folder: Path) -> set[str]:
    """The attempts whose workers have told their second step."""
    paths = folder.glob("multirun/*/*/*/events.jsonl")
    return {path.parent.name for path in paths if '"step": 2,' in path.read_text()}


def node_of(folder: Path, attempt: str) -> int:
    """The process that runs an attempt."""
    [ticket] = folder.glob(f"multirun/*/*/cluster/{attempt}.ticket")
    owner = taken_by(ticket)
    assert owner is not None
    return owner.pid


def outcomes(folder: Path) -> Counter[str]:
    return Counter(record["outcome"] for record in records_in(folder))


def end_nodes(folder: Path) -> None:
    """End the processes that run trials, if a test has left some."""
    for ticket in folder.rglob("*.ticket"):
        pid = node_of(folder, ticket.stem)
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
