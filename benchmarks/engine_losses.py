"""Compare the losses of the trials of benchmarks/sweep/engine_losses.yaml, step by step and each with each.

    python -m benchmarks.engine_losses SWEEP OUT

SWEEP is the sweep's folder. OUT/engine_losses.json has every step's loss.
"""

import statistics
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.reports import finished_trials, markdown, provenance, write_report
from lora_lab.events import Step

_NOTE = """Nats per token. All from one seed: the same rows in the same order, the same adapters. In fp32 the frozen
weights are as they were stored, not rounded to 16 bits."""


def apart(one: list[float], other: list[float]) -> dict[str, float]:
    """Return how far losses are apart step by step, in nats."""
    between = [abs(a - b) for a, b in zip(one, other, strict=True)]
    later = between[len(between) // 2 :]
    return {"median": statistics.median(between), "most": max(between), "most_in_second_half": max(later)}


def table(trials: dict[str, Any], pairs: dict[str, dict[str, float]]) -> str:
    """Return the tables of pairs and of trials."""
    differences = markdown(
        ["trials", "steps apart, median", "at most", "in the second half", "held-out loss apart"],
        [[pair, *(f"{figure:.4f}" for figure in figures.values())] for pair, figures in pairs.items()],
    )
    losses = markdown(
        ["trial", "first step", "last step", "held-out before", "after"],
        [
            [name, *(f"{loss:.4f}" for loss in (*trial["losses"][:: len(trial["losses"]) - 1], *trial["held_out"]))]
            for name, trial in trials.items()
        ],
    )
    return "\n\n".join([differences, losses, _NOTE])


def main() -> None:
    sweep, out = map(Path, sys.argv[1:])
    trials: dict[str, Any] = {}
    tags: dict[str, str] = {}
    for folder, record in finished_trials(sweep):
        events, _, _, _ = folder.read_inputs()
        trials[record.name] = {
            "losses": [event.loss for event in events if isinstance(event, Step)],
            "held_out": [record.metrics["loss/eval_before"], record.metrics["loss/eval"]],
        }
        tags = record.tags
    pairs = {
        f"{one} - {other}": apart(a["losses"], b["losses"]) | {"held_out": abs(a["held_out"][1] - b["held_out"][1])}
        for (one, a), (other, b) in combinations(trials.items(), 2)
    }
    text = table(trials, pairs)
    origin = provenance(tags, "python -m benchmarks.engine_losses SWEEP OUT")
    write_report(out, "engine_losses", "100 steps by each engine", origin, text, {"trials": trials, "apart": pairs})
    print(text)


if __name__ == "__main__":
    main()
