"""Run one sweep of equal trials with placement=one and with placement=each_gpu: the time of both, and what trials do to
their neighbours.

    python -m benchmarks.side_by_side OUT [--points 4] [--repeats 3] [override ...]

A first sweep, of one trial a card, is not counted: rates and tokens that are kept from then on are measured there.
On a CPU add `device=cpu placement.workers=2`. A trial of placement=one then has all cores, so its speed says nothing
there. OUT/side_by_side.json has every trial.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.reports import finished_trials, markdown, provenance, stored, where, write_report

_SWEEP = (
    *("model=qwen2_5_1_5b", "model.weights=random", "data=random_tokens", "data.rows=160", "measure.eval_rows=0"),
    *("batch_size=8", "seq_len=2048", "gradient_checkpointing=full", "measure.answers=0", "tracking=none"),
)
_NOTE = """{points} points that differ in the learning rate alone, {repeats} repeats. Seconds are from the start of the
first trial to the end of the last. The noise is the standard deviation of a slot's trials over their mean."""
FIGURES = {"tokens/s": "throughput/tokens_per_second", "J/token": "energy/joules_per_token"}
_HEADS = ["placement", "slot", "trials", "seconds", *(f"{name} (noise)" for name in FIGURES)]


def run(folder: Path, *overrides: str) -> None:
    """Run a sweep into `folder`.

    Raises: CalledProcessError when not all trials were measured."""
    command = [sys.executable, "-m", "lora_lab", "-m", *_SWEEP, *overrides, f"hydra.sweep.dir={folder}"]
    subprocess.run(command, check=True)


def seconds_of(folder: Path) -> float:
    """Return the seconds from the start of a sweep's first trial to the end of its last."""
    records = [record for _, record in finished_trials(folder)]
    return (max(each.ended_ms or 0 for each in records) - min(each.started_ms for each in records)) / 1e3


def trials(folder: Path) -> list[dict[str, Any]]:
    """Return point, repeat, slot, neighbours and figures of each trial of a sweep."""
    return [
        {
            "learning_rate": record.params["learning_rate"],
            "repeat": record.params["repeat"],
            "slot": record.tags.get("slot", record.tags.get("device.uuid", "all cores")),
            "neighbours": record.tags.get("neighbours", "no other trial"),
            "validity": record.tags.get("validity"),
            **{name: record.metrics.get(key) for name, key in FIGURES.items()},
        }
        for _, record in finished_trials(folder)
    ]


def by_slot(found: list[dict[str, Any]], name: str) -> dict[str, list[float]]:
    """Return a figure of the trials that have it, by slot."""
    slots: dict[str, list[float]] = {}
    for trial in found:
        if trial[name] is not None:
            slots.setdefault(trial["slot"], []).append(trial[name])
    return slots


def rows(of: Mapping[str, list[dict[str, Any]]], seconds: Mapping[str, float]) -> list[list[str]]:
    """Return a row for each placement and slot."""
    made = []
    for placement, found in of.items():
        for slot in dict.fromkeys(trial["slot"] for trial in found):
            cells = []
            for name in FIGURES:
                values = by_slot(found, name).get(slot, [])
                noise = f" ({statistics.stdev(values) / statistics.fmean(values):.1%})" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):,.4g}{noise}" if values else "-")
            number = sum(trial["slot"] == slot for trial in found)
            made.append([placement, slot, str(number), f"{seconds[placement]:.0f}", *cells])
    return made


def table() -> str:
    """Return docs/scale.md's table, from the stored trials."""
    content = stored("h200/side_by_side")
    seconds = content["seconds"]
    share = f"Side by side takes {seconds['each_gpu'] / seconds['one']:.3f} of the time."
    return f"{markdown(_HEADS, rows(content['trials'], seconds))}\n\n{share} Measured on {where(content['origin'])}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    asked, more = parser.parse_known_args()
    out, cards = asked.out.resolve(), max(1, torch.cuda.device_count())
    rates = [f"{1 + point}e-4" for point in range(max(asked.points, cards))]
    overrides = [*more, f"learning_rate={','.join(rates[: asked.points])}"]
    one = [each for each in overrides if not each.startswith("placement.")]
    run(out / "first", *more, f"learning_rate={','.join(rates[:cards])}", "placement=each_gpu")
    run(out / "one", *one, f"repeats={asked.repeats}")
    run(out / "each_gpu", *overrides, "placement=each_gpu", f"repeats={asked.repeats}")
    seconds = {placement: seconds_of(out / placement) for placement in ("one", "each_gpu")}
    of = {placement: trials(out / placement) for placement in seconds}
    share = seconds["each_gpu"] / seconds["one"]
    text = f"{markdown(_HEADS, rows(of, seconds))}\n\nSide by side takes {share:.2f} of the time.\n\n{_NOTE}"
    text = text.format(points=asked.points, repeats=asked.repeats)
    tags = next(record for _, record in finished_trials(out / "each_gpu")).tags
    origin = provenance(tags, " ".join(["python -m benchmarks.side_by_side OUT", *sys.argv[2:]]))
    write_report(out, "side_by_side", "Side by side", origin, text, {"seconds": seconds, "trials": of})
    print(text)


if __name__ == "__main__":
    main()
