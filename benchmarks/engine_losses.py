"""Does engine=graph learn what engine=eager learns? 100 steps of real text through a real model by each; by eager with
its other attention kernel: how far apart one mathematics comes out by rounding alone; and by eager in fp32, whose
rounding is next to nothing: which of two that differ is nearer to the truth.

    python -m benchmarks.engine_losses OUT [--without NAME]... [OVERRIDES...]

OUT/engine_losses.json has every step's loss. OVERRIDES go to all trials: model=tiny device=cpu, say, to see that it
works.
"""

import argparse
import json
import shlex
import statistics
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from benchmarks.cells import compose_cell, provenance, run_cell, write_report
from lora_lab.composition.explanations import explain
from lora_lab.config import InvalidInput

TRIALS = {
    "eager": ["engine=eager", "attention=sdpa"],
    "eager, other attention kernel": ["engine=eager", "attention=eager"],
    "eager, fp32": ["engine=eager", "attention=sdpa", "precision=fp32"],
    "liger": ["engine=liger", "attention=sdpa"],
    "compile": ["engine=compile", "attention=sdpa"],
    "graph": ["engine=graph", "attention=sdpa"],
}
COMMON = ["measure.warmup_steps=10", "measure.steps=90", "measure.eval_rows=64", "measure.profile_steps=0"]
COMMON += ["measure.idle_seconds=0", "tracking=none"]


def losses(folder: Path) -> list[float]:
    """Training loss of each step, nats a token, in order."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event["loss"] for event in events if event["event"] == "Step"]


def apart(one: list[float], other: list[float]) -> dict[str, float]:
    """Differences step by step, in nats."""
    between = [abs(a - b) for a, b in zip(one, other, strict=True)]
    later = between[len(between) // 2 :]
    return {"median": statistics.median(between), "most": max(between), "most_in_second_half": max(later)}


def table(content: dict[str, Any]) -> str:
    """Every pair of trials: steps and held-out loss apart."""
    lines = ["| trials | steps apart, median | at most | in the second half | held-out loss apart |", "|" + "---|" * 5]
    for pair, found in content["apart"].items():
        figures = [found[key] for key in ("median", "most", "most_in_second_half", "held_out")]
        lines.append(f"| {pair} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |")
    lines += ["", "| trial | first step | last step | held-out before | after |", "|" + "---|" * 5]
    for name, trial in content["trials"].items():
        first, *_, last = trial["losses"]
        held = f"{trial['held_out_before']:.4f} | {trial['held_out']:.4f}"
        lines.append(f"| {name} | {first:.4f} | {last:.4f} | {held} |")
    if content["left_out"]:
        lines += ["", *(f"- {name}: {why}" for name, why in content["left_out"].items())]
    lines += [
        "",
        "Nats a token. All from one seed: the same rows in the same order, the same adapters. In fp32 the frozen",
    ]
    return "\n".join([*lines, "weights are as they were stored, not rounded to 16 bits."])


def _parse() -> argparse.Namespace:
    """The command line; every trial is composed, so that what can't be meant is told before the first one runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_losses", description="100 steps by each engine.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--without", action="append", default=[], choices=TRIALS, help="a trial to leave out")
    parser.add_argument("overrides", nargs="*", help="for all trials: model=smollm2_135m, say")
    asked = parser.parse_intermixed_args()
    try:
        for changes in TRIALS.values():
            compose_cell([*COMMON, *asked.overrides, *changes])
    except (HydraException, InvalidInput) as error:
        parser.error(explain(error))
    return asked


def main() -> None:
    """Run, compare, write."""
    asked = _parse()
    asked_for = [name for name in TRIALS if name not in asked.without]
    content: dict[str, Any] = {"trials": {}, "apart": {}, "left_out": dict.fromkeys(asked.without, "not asked for")}
    command = shlex.join([*(word for name in asked.without for word in ("--without", name)), *asked.overrides])
    with tempfile.TemporaryDirectory() as place:
        for number, name in enumerate(asked_for):
            folder = Path(place) / str(number)
            record = run_cell([*COMMON, *asked.overrides, *TRIALS[name]], folder)
            if record["outcome"] != "finished":
                content["left_out"][name] = f"{record['outcome']}, {record['tags'].get('reason', 'no reason given')}"
                continue
            content["trials"][name] = {
                "losses": losses(folder),
                "held_out_before": record["metrics"]["loss/eval_before"],
                "held_out": record["metrics"]["loss/eval"],
                "attention_kernel": record["tags"].get("ran.attention_kernel"),
            }
            origin = provenance(record, f"python -m benchmarks.engine_losses OUT {command}")
            print(f"{name}: held-out {content['trials'][name]['held_out']:.4f}", flush=True)
    if not content["trials"]:
        raise SystemExit("\n".join(f"{name}: {why}" for name, why in content["left_out"].items()))
    for (one, a), (other, b) in combinations(content["trials"].items(), 2):
        held = abs(a["held_out"] - b["held_out"])
        content["apart"][f"{one} - {other}"] = apart(a["losses"], b["losses"]) | {"held_out": held}
    text = table(content)
    write_report(asked.out, "engine_losses", "100 steps by each engine", origin, text, content)
    print(text)


if __name__ == "__main__":
    main()
