"""Compare one trial on one card with one over two cards, data parallel: tokens/s, energy, memory.

    python -m benchmarks.data_parallel OUT [--rounds 2] [--seconds 330] [--only CELL] [--have FILE] [--rehearse]

Each trial is a command of its own, alone on the host. In every round each cell runs on one card and on two, in turns:
the order of the two changes from round to round. Each card has as many rows as the one card alone, so an exchange that
costs nothing doubles the tokens/s. Writes OUT/data_parallel.json after every trial; no trial begins that would probably
end after --seconds.
--have goes on after the turns of an earlier file: compare only those of one host.
--rehearse runs a tiny model with two workers on the CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.reports import markdown, provenance, stored
from lora_lab.files import write_json
from lora_lab.store.trial_folder import TrialFolder

COMMON = [
    "model.weights=random",
    "data=random_tokens",
    "tracking=none",
    "measure.eval_rows=0",
    "measure.general_rows=0",
    "measure.answers=0",
    "measure.profile_steps=0",
    "measure.idle_seconds=0",
]
_QWEN = [*COMMON, "model=qwen2_5_1_5b", "method=qlora", "engine=graph", "data.rows=512", "measure.warmup_steps=5"]
CELLS = {
    "8x2048": [*_QWEN, "batch_size=8", "seq_len=2048", "measure.steps=20"],
    "1x512": [*_QWEN, "batch_size=1", "seq_len=512", "measure.steps=150"],
}
_TINY = {"tiny 2x64": [*COMMON, "model=tiny", "device=cpu", "data.rows=60", "batch_size=2", "seq_len=64"]}
_KEPT = ("throughput/", "energy/", "vram/", "card/", "time/", "window/", "loss/")
_SPEED, _ENERGY = "throughput/tokens_per_second", "energy/joules_per_token"


def run(name: str, overrides: list[str]) -> dict[str, Any]:
    """Run a trial, and return what its record says."""
    folder = Path("multirun/benchmarks/data_parallel") / f"{name}-{time.time_ns()}"
    began = time.monotonic()
    command = [sys.executable, "-m", "lora_lab", *overrides, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    record = TrialFolder(folder).record()
    found = {"exit_code": done.returncode, "seconds": time.monotonic() - began}
    if record is None:
        return {**found, "outcome": "no record", "metrics": {}, "tags": {}}
    return {
        **found,
        "outcome": record.outcome,
        "metrics": {key: value for key, value in record.metrics.items() if key.startswith(_KEPT)},
        "tags": record.tags,
    }


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return for each cell the medians of one and of two, and their ratios; None where a side has no figure."""
    found: dict[str, Any] = {}
    for cell in dict.fromkeys(turn["cell"] for turn in turns):
        sides = {}
        for count in (1, 2):
            own = [turn["metrics"] for turn in turns if (turn["cell"], turn["count"]) == (cell, count)]
            sides[count] = {
                name: statistics.median(values) if (values := [m[name] for m in own if name in m]) else None
                for name in (_SPEED, _ENERGY)
            }
        ratio = {
            name: sides[2][name] / sides[1][name] if sides[1][name] and sides[2][name] else None
            for name in (_SPEED, _ENERGY)
        }
        found[cell] = {"one": sides[1], "two": sides[2], "ratio": ratio}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--have", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    due = time.monotonic() + asked.seconds
    number = "workers" if asked.rehearse else "gpus"
    placements = {1: ["placement=one"], 2: ["placement=ddp", f"placement.{number}=2"]}
    turns: list[dict[str, Any]] = [] if asked.have is None else json.loads(asked.have.read_text())["turns"]
    chosen = {cell: each for cell, each in (_TINY if asked.rehearse else CELLS).items() if asked.only in cell}
    for turn in range(asked.rounds):
        for cell, overrides in chosen.items():
            for count in (1, 2) if turn % 2 == 0 else (2, 1):
                longest = max((each["seconds"] for each in turns), default=0.0)
                if time.monotonic() + longest > due:
                    print(f"no time is left for {cell} on {count} in round {turn + 1}", flush=True)
                    continue
                found = run(f"{count}-{cell.replace(' ', '_')}", [*overrides, *placements[count]])
                tags = found.pop("tags")
                turns.append({"cell": cell, "count": count, "round": turn, **found, "ran": _ran(tags)})
                origin = provenance(tags, "python -m benchmarks.data_parallel") if tags else {}
                content = {"origin": origin, "summary": summary(turns), "turns": turns}
                write_json(asked.out / "data_parallel.json", content)
                print(
                    cell, count, found["outcome"], found["metrics"].get(_SPEED), f"{found['seconds']:.0f} s", flush=True
                )
    for cell, each in summary(turns).items():
        print(cell, each["ratio"], flush=True)


def table() -> str:
    """Return docs/scale.md's table, from the stored turns."""
    content = stored("h200/data_parallel")
    lines = []
    for cell, each in content["summary"].items():
        sides = [[turn for turn in content["turns"] if (turn["cell"], turn["count"]) == (cell, n)] for n in (1, 2)]
        speeds = [f"{each[side][_SPEED]:,.0f}" for side in ("one", "two")]
        ratios = [f"{each['ratio'][name]:.2f}" for name in (_SPEED, _ENERGY)]
        lines.append([cell, str(min(map(len, sides))), *speeds, *ratios])
    head = ["rows a card", "rounds", "tokens/s, one card", "two cards", "tokens/s, two of one", "J/token, two of one"]
    commits = ", ".join(sorted({turn["commit"][:7] for turn in content["turns"]}))
    return f"{markdown(head, lines)}\n\nMeasured on {content['origin']['device']}, commits {commits}."


def _ran(tags: dict[str, str]) -> dict[str, str]:
    """Return what the record says of how it ran and why it ended."""
    return {
        key: text
        for key, text in tags.items()
        if key.startswith(("ran.", "vram_by_card", "validity", "device")) or key in ("reason", "world_size")
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
