"""Compare adapters that train together with the same adapters one after the other: speed, memory, energy.

    python -m benchmarks.cotrain OUT [--members 8] [--alone 8] [--cells 1x512,8x2048] [--ways ...] [--rehearse]

Each way of a cell is one sweep, of points that differ in the learning rate: with cotrain or without, with engine=eager
or engine=graph. --alone runs fewer of the trials in turn, whose mean then stands for all. A way whose results OUT has
is not run again, so that a long measurement may be taken in parts. Writes OUT/cotrain.json after every way, and
OUT/cotrain.md. --rehearse runs a tiny model on the CPU, without graph.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.reports import finished_trials, markdown, provenance, stored, where, write_report

_COMMON = (
    *(
        "model.weights=random",
        "data=random_tokens",
        "tracking=none",
        "engine.chunked_loss=true",
    ),
    *("measure.eval_rows=0", "measure.general_rows=0", "measure.answers=0", "measure.profile_steps=0"),
)
_QWEN = (*_COMMON, "model=qwen2_5_1_5b", "method=qlora")
CELLS = {
    # windows of more than two seconds with the fastest way: else there are no joules
    "1x512": (*_QWEN, "batch_size=1", "seq_len=512", "data.rows=200", "measure.warmup_steps=20", "measure.steps=150"),
    "8x2048": (
        *_QWEN,
        *("batch_size=8", "seq_len=2048", "gradient_checkpointing=full", "data.rows=160"),
        *("measure.warmup_steps=3", "measure.steps=10"),
    ),
}
_TINY = {"tiny": (*_COMMON, "model=tiny", "method=lora", "device=cpu", "batch_size=1", "seq_len=64", "data.rows=40")}
WAYS = {
    "eager together": ("engine=eager", "cotrain=[learning_rate]"),
    "graph together": ("engine=graph", "cotrain=[learning_rate]"),
    "eager in turn": ("engine=eager",),
    "graph in turn": ("engine=graph",),
}
_HEADS = [
    *("rows", "way", "trials", "seconds", "tokens/s", "GiB", "J/token"),
    *("best together: times faster", "times shorter", "its memory", "its energy"),
]
_NOTE = """{members} adapters that differ in the learning rate. Tokens/s are of all adapters: together their sum, in
turn the tokens of all trials over the seconds of their windows. Seconds are from the first start to the last end,
loading included, for {members} adapters; in turn they are scaled from the trials that ran. VRAM is torch's peak, of the
one job or of the largest trial. Ratios compare the best way together (graph, else eager) with each way in turn."""


def measured(folder: Path, members: int) -> dict[str, Any]:
    """Return the figures of a sweep's trials, all of them together.

    Raises: StatisticsError when none finished."""
    records = [record for _, record in finished_trials(folder)]
    metrics = [record.metrics for record in records]
    is_job = "cotrain.members" in records[0].tags if records else False
    speeds = [each["throughput/tokens_per_second"] for each in metrics]
    seconds = (max(each.ended_ms or 0 for each in records) - min(each.started_ms for each in records)) / 1e3
    joules = [each["energy/joules_per_token"] for each in metrics if "energy/joules_per_token" in each]
    peaks = [each["vram/peak_allocated_gib"] for each in metrics if "vram/peak_allocated_gib" in each]
    return {
        "trials": len(records),
        "seconds": seconds if is_job else seconds * members / len(records),
        "tokens/s": sum(speeds) if is_job else statistics.harmonic_mean(speeds),
        "J/token": statistics.fmean(joules) if joules else None,
        "GiB": max(peaks, default=None),
        "validity": sorted({record.tags.get("validity", "unknown") for record in records}),
        "tags": records[0].tags,
    }


def ratios(together: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
    """Return how the adapters together compare with them in turn; None where a figure is absent."""

    def over(name: str) -> float | None:
        return together[name] / other[name] if together[name] and other[name] else None

    shorter = other["seconds"] / together["seconds"]
    return {"faster": over("tokens/s"), "shorter": shorter, "memory": over("GiB"), "energy": over("J/token")}


def _rows(cells: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for cell, ways in cells.items():
        for way, found in ways.items():
            best = ways.get("graph together", ways.get("eager together"))
            is_compared = way.endswith("in turn") and best is not None
            against = ratios(best, found) if is_compared and best else dict.fromkeys(ratios(found, found))
            figures = [f"{found['seconds']:.0f}", f"{found['tokens/s']:,.0f}", _text(found["GiB"], "{:.2f}")]
            figures += [_text(found["J/token"], "{:.4f}"), *(_text(each, "{:.2f}") for each in against.values())]
            rows.append([cell, way, str(found["trials"]), *figures])
    return rows


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def table() -> str:
    """Return docs/methods.md's table, from the stored ways."""
    content = stored("h200/cotrain")
    text = markdown(_HEADS, _rows(content["cells"]))
    return f"{text}\n\n{_NOTE.format(members=8)} Measured on {where(content['origin'])}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--alone", type=int)
    parser.add_argument("--cells", default="")
    parser.add_argument("--ways", default="")
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    out = asked.out.resolve()
    cells = _TINY if asked.rehearse else CELLS
    cells = {name: each for name, each in cells.items() if name in (asked.cells or name).split(",")}
    ways = {name: each for name, each in WAYS.items() if name in (asked.ways or name).split(",")}
    if asked.rehearse:
        ways = {name: each for name, each in ways.items() if "graph" not in name}
    kept = out / "cotrain.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))["cells"] if kept.is_file() else {}
    for cell, overrides in cells.items():
        for way, more in ways.items():
            if way in found.get(cell, {}):
                continue
            count = asked.members if way.endswith("together") else asked.alone or asked.members
            rates = ",".join(f"{1 + number}e-4" for number in range(count))
            folder = out / f"{cell}-{way.replace(' ', '_')}"
            command = [sys.executable, "-m", "lora_lab", "-m", *overrides, *more, f"learning_rate={rates}"]
            subprocess.run([*command, f"hydra.sweep.dir={folder}"], check=True)
            found.setdefault(cell, {})[way] = measured(folder, asked.members)
            tags = found[cell][way].pop("tags")
            text = f"{markdown(_HEADS, _rows(found))}\n\n{_NOTE.format(members=asked.members)}"
            origin = provenance(tags, " ".join(["python -m benchmarks.cotrain OUT", *sys.argv[2:]]))
            write_report(out, "cotrain", "Adapters together", origin, text, {"cells": found})
            print(text, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
