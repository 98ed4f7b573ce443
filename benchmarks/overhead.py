"""What a trial costs beyond its own work, beside a plain Hydra -m with one fresh interpreter a trial.

    python -m benchmarks.overhead OUT [override ...]

Overhead of a trial: from when it is asked for to its first step, and from its last step to when the next one is
asked for, less loading the model and evaluating. Idle measurement and profiling, which have settings of their own, are
turned off. Both sides run the same trials with the same worker code, in two alternating rounds; the first trial of a
round pays for starting up and is shown apart.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from benchmarks.reports import markdown, provenance, write_report
from lora_lab.events import Ended, Event, PhaseBegan, WindowClosed, decode
from lora_lab.phase import Phase
from lora_lab.store.environment import device_facts, environment
from lora_lab.trial.devices import choose_placement

TRIALS = 5
COMMON = [
    "measure.idle_seconds=0",
    "measure.profile_steps=0",
    "model=tiny",
    "measure=quick",
    "data=random_tokens",
    "data.rows=32",
    "seq_len=64",
]
_WORK = (
    *(Phase.matmul_rate, Phase.conversion, Phase.model),
    *(Phase.evaluation_before, Phase.compilation, Phase.evaluation_after),
)


def run(module: str, folder: Path, overrides: list[str]) -> None:
    rates = ",".join(f"{n}e-4" for n in range(1, TRIALS + 1))
    command = [sys.executable, "-m", module, "-m", *COMMON, *overrides, f"learning_rate={rates}"]
    done = subprocess.run(
        [*command, f"hydra.sweep.dir={folder}", f"tracking.root={folder}/mlruns"], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def trials(folder: Path) -> Iterator[tuple[float, list[Event]]]:
    """When each trial was asked for, and its events, in the order of running."""
    for path in folder.glob("[0-9]*"):
        asked = path / "trial.json" if (path / "trial.json").is_file() else path / "asked.json"
        events = [decode(line) for line in (path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
        yield json.loads(asked.read_text(encoding="utf-8"))["t"], events


def overheads(folder: Path) -> list[dict[str, float]]:
    """Seconds before the first step and after the last one, for each trial but the last."""
    found = []
    ran = sorted(trials(folder), key=lambda trial: trial[0])
    for (asked, events), (next_asked, _) in pairwise(ran):
        spent = dict.fromkeys((phase.value for phase in Phase), 0.0)
        begun = [event for event in events if isinstance(event, PhaseBegan)]
        ends = [event.t for event in (*begun[1:], *(event for event in events if isinstance(event, Ended)))]
        for phase, end in zip(begun, ends, strict=True):
            spent[phase.phase] += end - phase.t
        first = next(event.t for event in begun if event.phase == Phase.warm_up.value)
        last = next(event.t for event in events if isinstance(event, WindowClosed))
        before = first - asked - sum(spent[phase.value] for phase in _WORK[:4])
        after = next_asked - last - spent[Phase.evaluation_after.value]
        work = sum(spent[phase.value] for phase in _WORK)
        found.append({"before": before, "after": after, "overhead": before + after, "work": work})
    return found


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    sides: dict[str, list[list[dict[str, float]]]] = {"lora_lab": [], "plain Hydra": []}
    for turn in range(2):
        for side, module in (("lora_lab", "lora_lab"), ("plain Hydra", "benchmarks.plain_hydra")):
            folder = Path("multirun/overhead").resolve() / f"{module}-{turn}"
            run(module, folder, overrides)
            sides[side].append(overheads(folder))
    rows = []
    for side, rounds in sides.items():
        later = [trial for ran in rounds for trial in ran[1:]]
        row = [side]
        for key in ("overhead", "before", "after"):
            values = [trial[key] for trial in later]
            row.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        rows.append([*row, ", ".join(f"{ran[0]['overhead']:.2f}" for ran in rounds)])
    head = ["", "overhead s, median (range)", "before the first step", "after the last", "first trial"]
    text = markdown(head, rows)
    facts = environment() | device_facts(choose_placement("auto"))
    origin = provenance(facts, " ".join(["python -m benchmarks.overhead OUT", *overrides]))
    write_report(out, "overhead", "Overhead of a trial in a sweep", origin, text, {"seconds": sides})
    print(text)


if __name__ == "__main__":
    main()
