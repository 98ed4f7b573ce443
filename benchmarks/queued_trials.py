"""Run a sweep of many trials on simulated nodes while nodes are killed at random, and count what was lost or doubled.

    python -m benchmarks.queued_trials OUT [URI]

A node is a process of this machine with a host name of its own; tests/fakes stands for Slurm's commands and for what a
trial's worker does, which here only waits. Queue, tickets, records, new attempts and the delivery to a real MLflow
server are lora_lab's own. It needs no card. URI is a server's; without it one is started. OUT/queued_trials.json has
what waiting for the queue costs in 48 trials on 4 nodes, one of which is lost, and the counts of 1,000 trials on 50.
"""

import contextlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reports import markdown, provenance, stored, where, write_report
from lora_lab.store.environment import environment

_ROOT = Path(__file__).resolve().parents[1]
FAKES = _ROOT / "tests" / "fakes"
_SWEEP = (
    *("-m", "model=tiny", "measure=quick", "method=lora", "precision=fp32", "seq_len=32", "data=random_tokens"),
    *("data.rows=16", "device=cpu", "share_device=true", "cluster=slurm"),
)
_POINTS = 20
EXPERIMENT = "queued_trials"
LOG = "moments.jsonl"
"""The moments at which trials begin and end, and nodes are killed."""
_SPARED = "-3"
"""How the name of a third attempt ends; after it a start gives a trial up, so the last one is not killed."""


Start = Callable[[list[str], Path, dict[str, str]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is simulated."""

    trials: int
    nodes: int
    seconds: float
    """How long a trial's worker works."""
    kills: float
    """How many nodes are killed for each trial."""
    killed_job: int = 0
    """The only job that is killed, in the middle of its trial; 0 where they are drawn."""
    seed: int = 0

    @property
    def command(self) -> list[str]:
        """The sweep's arguments: a few points, each repeated."""
        points = math.gcd(_POINTS, self.trials)
        rates = ",".join(f"{number}e-5" for number in range(1, points + 1))
        grid = [f"learning_rate={rates}", f"repeats={self.trials // points}"]
        return [*_SWEEP, *grid, f"cluster.workers={self.nodes}"]

    def variables(self, folder: Path) -> dict[str, str]:
        """What the command's environment has besides this process's."""
        fakes = [str(FAKES / "quick_nodes"), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "PATH": os.pathsep.join([str(FAKES / "slurm"), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(fakes),
            "FAKE_SLURM": str(folder / "slurm"),
            "QUICK_LOG": str(folder / LOG),
            "QUICK_SECONDS": str(self.seconds),
        }


class Killer(threading.Thread):
    """Kills nodes at random moments of their jobs, from their very start on: three of four by SIGKILL, as a machine
    dies, the others by SIGTERM, as Slurm takes a node back."""

    def __init__(self, asked: Asked, folder: Path) -> None:
        super().__init__(name="killer", daemon=True)
        self.killed: Counter[str] = Counter()
        """How often, by signal."""
        self._asked = asked
        self._folder = folder
        self._random = random.Random(asked.seed)
        self._due: dict[str, float] = {}
        """When each job that was seen is to be killed; infinity for most."""
        self._over = threading.Event()

    def end(self) -> None:
        """Kill no more."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """Look for jobs that run, and kill those whose time has come."""
        while not self._over.wait(0.1):
            for command in self._folder.glob("slurm/*/command"):
                number = command.parent.name
                if number not in self._due:
                    self._due[number] = self._draw(number)
                if time.monotonic() > self._due[number]:
                    self._due[number] = float("inf")
                    self._kill(command)

    def _draw(self, number: str) -> float:
        """Return when a job that has just begun is to be killed."""
        if self._asked.killed_job:
            middle = time.monotonic() + self._asked.seconds / 2
            return middle if number == str(self._asked.killed_job) else float("inf")
        if number == "1" or self._random.random() > self._asked.kills or self._is_last(number):
            return float("inf")  # the first job looks at a node
        return time.monotonic() + self._random.uniform(0.0, self._asked.seconds + 1.0)

    def _is_last(self, number: str) -> bool:
        noted = self._folder.glob(f"multirun/*/*/cluster/*{_SPARED}.job")
        return any(path.read_text(encoding="ascii").strip() == f"slurm {number}" for path in noted)

    def _kill(self, command: Path) -> None:
        how = self._random.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
        if (command.parent / "code").exists():
            return
        try:
            os.kill(int(command.read_text(encoding="ascii")), how)
        except (ProcessLookupError, ValueError):
            return
        self.killed[how.name] += 1
        note(self._folder / LOG, command.parent.name, "killed")


@dataclass(slots=True, kw_only=True)
class Counted:
    """What became of a queue."""

    trials: int = 0
    attempts: int = 0
    """Folders of attempts with a record."""
    lost: list[str] = field(default_factory=list)
    """Trials without a finished attempt."""
    doubled: list[str] = field(default_factory=list)
    """Trials with more than one finished attempt, and attempts that two processes have begun."""
    apart: list[str] = field(default_factory=list)
    """Records that the store does not have, or has twice, or with another outcome, and runs without a record."""
    outcomes: dict[str, int] = field(default_factory=dict)
    wall_seconds: float = 0.0
    """From the first trial's beginning to the last one's end."""
    idle_seconds: float = 0.0
    """How long a node waits for its next trial, as a mean, while there are trials left."""


def counted(sweep: Path, log: Path, runs: Mapping[str, list[str]], nodes: int) -> Counted:
    """Return what became of a sweep's trials.

    Args:
        log: what the stand-in for the trials has noted.
        runs: the outcomes of the store's runs, by the id of their record."""
    plan = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))
    records = {path.parent.name: json.loads(path.read_bytes()) for path in sorted(sweep.glob("[0-9]*/record.json"))}
    finished = Counter(name.partition("-")[0] for name, each in records.items() if each["outcome"] == "finished")
    names = [f"{trial['number']:04d}" for trial in plan["trials"]]
    noted = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    begun = Counter(each["attempt"] for each in noted if each["what"] == "begin")
    told = {each["id"]: each["outcome"] for each in records.values()}
    return Counted(
        trials=len(names),
        attempts=len(records),
        lost=[name for name in names if not finished[name]],
        doubled=[name for name in names if finished[name] > 1] + [name for name, times in begun.items() if times > 1],
        apart=[one for one in {*told, *runs} if runs.get(one) != [told.get(one)]],
        outcomes=dict(Counter(each["outcome"] for each in records.values())),
        wall_seconds=max(each["t"] for each in noted) - min(each["t"] for each in noted),
        idle_seconds=_idle(noted, nodes),
    )


def _idle(noted: list[dict[str, Any]], nodes: int) -> float:
    """Return the time that nodes were without a trial until the last one began, divided by the number of beginnings.

    The queue's own beginning is left out: until each node had its first trial."""
    moments = sorted(noted, key=lambda each: each["t"])
    begins = [each["t"] for each in moments if each["what"] == "begin"]
    first, last = begins[min(nodes, len(begins)) - 1], begins[-1]
    busy: set[str] = set()
    idle, since = 0.0, first
    for each in moments:
        if first < each["t"] <= last:
            idle += (nodes - len(busy)) * (each["t"] - since)
            since = each["t"]
        (busy.add if each["what"] == "begin" else busy.discard)(each["job"])
    return idle / max(1, len(begins) - nodes)


def note(log: Path, job: str, what: str) -> None:
    """Add a moment to what the stand-in for the trials notes."""
    line = {"attempt": "", "job": job, "what": what, "t": time.monotonic()}
    with log.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def runs_in(uri: str, sweep: Path) -> dict[str, list[str]]:
    """Return the outcomes of a store's runs of a sweep's trials, by the id of their record."""
    from mlflow.tracking import MlflowClient

    from lora_lab.store.mlflow_names import read_back

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    parent = json.loads((sweep / "delivered.json").read_text(encoding="utf-8"))["run_id"]
    asked = {"filter_string": f"tags.mlflow.parentRunId = '{parent}'", "max_results": 500}
    found: dict[str, list[str]] = {}
    page: str | None = ""
    while page is not None:
        runs = client.search_runs([experiment.experiment_id], page_token=page or None, **asked)
        for run in runs:
            tags = read_back(run.data.params, run.data.tags, run.data.metrics)[1]
            found.setdefault(tags["record_id"], []).append(tags["outcome"])
        page = runs.token or None
    return found


def run(asked: Asked, folder: Path, uri: str, start: Start) -> tuple[Counted, Counter[str]]:
    """Run a sweep to its end while nodes are killed. Return what became of its trials, and how often nodes were killed.

    Args:
        uri: of the MLflow server that gets the records.
        start: starts a command of lora_lab in a folder with variables of its own; returns its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / LOG).exists():
        raise ValueError(f"{folder} holds the moments of an earlier run: use a new folder")
    killer = Killer(asked, folder)
    killer.start()
    try:
        server = ["tracking=server", f"tracking.uri={uri}", f"tracking.experiment={EXPERIMENT}"]
        code = start([*asked.command, *server], folder, asked.variables(folder))
    finally:
        killer.end()
    [sweep] = {path.parent for path in folder.glob("multirun/*/*/sweep.json")}
    found = counted(sweep, folder / LOG, runs_in(uri, sweep), asked.nodes)
    if code:
        found.apart.append(f"the command's exit code is {code}")
    return found, killer.killed


RUNS = {
    "none killed": Asked(trials=48, nodes=4, seconds=20.0, kills=0.0),
    "one killed": Asked(trials=48, nodes=4, seconds=20.0, kills=0.0, killed_job=26),
    "killed at random": Asked(trials=1000, nodes=50, seconds=15.0, kills=0.15),
}
_NOTE = """A trial's worker only waits. The ideal is its seconds times the trials over the nodes, as if no node were
ever without a trial or lost. Between two trials is how long a node has no trial while there are some left: for the old
trial's record, the way through the queue, the start of a process (here a fork of one that has imported everything), and
the command, which does one thing at a time. Its CPU time goes into planning, submitting and delivering."""


def _start(words: list[str], folder: Path, variables: dict[str, str]) -> int:
    """Start a command in a fork of the tests' server of commands; note its CPU time next to what it prints."""
    import psutil
    from conftest import SERVER

    command = SERVER.start("lora_lab", words, folder, {**SERVER.environment, **variables})
    used: list[float] = []

    def look() -> None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(command.pid)
            while True:
                used.append(sum(process.cpu_times()[:2]))
                time.sleep(0.5)

    threading.Thread(target=look, daemon=True).start()
    (folder / "printed.txt").write_text(command.communicate(24 * 3600)[0], encoding="utf-8")
    (folder / "cpu_seconds").write_text(f"{used[-1]}", encoding="ascii")
    return command.wait()


def _row(name: str, found: dict[str, Any]) -> list[str]:
    asked = found["asked"]
    ideal = asked["trials"] * asked["seconds"] / asked["nodes"]
    return [
        f"{name}: {asked['trials']} trials of {asked['seconds']:.0f} s on {asked['nodes']} nodes",
        str(sum(found["killed"].values())),
        str(found["attempts"]),
        *(str(len(found[key])) for key in ("lost", "doubled", "apart")),
        f"{found['wall_seconds'] / ideal:.3f}",
        f"{found['idle_seconds']:.2f}",
        f"{found['command_cpu_seconds'] / found['attempts']:.2f}",
    ]


def main() -> None:
    sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tests" / "helpers")]
    from conftest import ON_FEW_CORES, SERVER, Server

    out, uris = Path(sys.argv[1]).resolve(), sys.argv[2:3]
    os.environ.update(ON_FEW_CORES)
    SERVER.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    SERVER.share()  # the nodes find it by a variable
    SERVER.environment = {**SERVER.environment, **os.environ}
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(SERVER.stop)
        out.mkdir(parents=True, exist_ok=True)
        uri = uris[0] if uris else stack.enter_context(Server(out / "server")).uri
        for name, asked in RUNS.items():
            folder = out / name.replace(" ", "_")
            found, killed = run(asked, folder, uri, _start)
            used = float((folder / "cpu_seconds").read_text(encoding="ascii"))
            results[name] = (
                {"asked": asdict(asked)} | asdict(found) | {"killed": dict(killed), "command_cpu_seconds": used}
            )
            _write(out, results)


_HEADS = ["", "kills", "attempts", "lost", "doubled", "wrong in MLflow", "time over the ideal"]
_HEADS += ["seconds between two trials", "CPU seconds of the command an attempt"]


def table(runs: Mapping[str, dict[str, Any]]) -> str:
    """Return a row for each simulated queue, and what the columns mean."""
    return f"{markdown(_HEADS, [_row(name, found) for name, found in runs.items()])}\n\n{_NOTE}"


def quoted() -> str:
    """Return the stored table, and where it was made."""
    found = stored("cpu/queued_trials")
    places = dict.fromkeys(where(run.get("origin", found["origin"])) for run in found["runs"].values())
    return f"{table(found['runs'])}\n\nSimulated on {'; '.join(places)}."


def _write(out: Path, results: dict[str, Any]) -> None:
    origin = provenance(environment(), "python -m benchmarks.queued_trials OUT")
    write_report(out, "queued_trials", "A queue whose nodes are killed", origin, table(results), {"runs": results})
    print(table(results))


if __name__ == "__main__":
    main()
