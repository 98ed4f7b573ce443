"""What looking costs: the sampler switched on and off every few steps inside one trial.

    python -m benchmarks.looking OUT [SECONDS [override ...]]

Whole trials spread by several per cent, so two of them can't show half a per cent. Blocks of steps with the sampler on
(A) and off (B) follow each other as A B B A, so that a steady drift falls out of each group of four; the first steps
of a block are left out, since they were queued before the switch. The cost is the mean over the groups of
log(step time with) - log(step time without), each from the blocks' median steps, with Student's 95 % interval. As a
check of the method the same is done with the labels of an A and a B of each group exchanged ("sham"), whose true
value is 0. Random weights and tokens at Qwen2.5-1.5B's shapes.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from benchmarks.cells import compose_cell, provenance
from benchmarks.one_factor import last_wins
from lora_lab import processes
from lora_lab.devices import choose_card, worker_environment
from lora_lab.environment import device_facts, environment
from lora_lab.events import Event, Step, WindowOpened
from lora_lab.telemetry.nvml import Card
from lora_lab.telemetry.rapl import Rapl
from lora_lab.telemetry.sampler import Sampler
from lora_lab.telemetry.sensors import reader

BLOCK, LEFT_OUT = 6, 2
PATTERN = (True, False, False, True)
COMMON = [
    "model=qwen2_5_1_5b",
    "model.weights=random",
    "data=random_tokens",
    "data.rows=256",
    "measure.warmup_steps=10",
    "measure.eval_rows=0",
    "measure.profile_steps=0",
    "tracking=none",
]
SHAPES = {"1x512": ["batch_size=1", "seq_len=512"], "2x2048": ["batch_size=2", "seq_len=2048"]}
_GUESSED_STEP_SECONDS = 0.35


def watched(config: Any, card: Card | None, folder: Path) -> tuple[list[tuple[int, bool, float]], float]:
    """One trial: (block, sampler on, seconds) of each step that counts, and the sampler's share of a core while on."""
    folder.mkdir(parents=True, exist_ok=True)
    steps: list[tuple[int, bool, float]] = []
    sampler = Sampler(reader(card, Rapl()))
    first = 0

    def on(block: int) -> bool:
        return PATTERN[block % len(PATTERN)]

    def hear(event: Event) -> None:
        nonlocal first
        if isinstance(event, WindowOpened):
            first = event.after_step + 1
        if not isinstance(event, Step) or not first or event.step < first:
            return
        block, place = divmod(event.step - first, BLOCK)
        if place >= LEFT_OUT and event.seconds is not None:
            steps.append((block, on(block), event.seconds))
        if place == BLOCK - 1:
            sampler.pause(not on(block + 1))

    with sampler:
        end = processes.run_worker(config, worker_environment(card), folder, hear)
    if end.reason:
        raise SystemExit(f"{end.outcome.value}: {end.reason}")
    return steps, sampler.cpu_seconds / (sampler.seconds / 2) if sampler.seconds else 0.0


def effect(steps: list[tuple[int, bool, float]], sham: bool) -> tuple[float, float, int]:
    """(relative change of the step time, half its 95 % interval, groups)."""
    blocks: dict[int, list[float]] = {}
    for block, _, seconds in steps:
        blocks.setdefault(block, []).append(seconds)
    logs = {block: math.log(statistics.median(times)) for block, times in blocks.items() if len(times) > 1}
    groups = [range(start, start + 4) for start in range(0, max(logs, default=0), 4)]
    whole = [[logs[block] for block in group] for group in groups if all(block in logs for block in group)]
    # A B B A: with and without; sham: the first half of each against its second half, which drift enters twice
    signs = (1, -1, 1, -1) if sham else (1, -1, -1, 1)
    differences = [sum(sign * log for sign, log in zip(signs, group, strict=True)) / 2 for group in whole]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = float(student.ppf(0.975, len(differences) - 1)) * error
    return statistics.fmean(differences), half, len(differences)


def main() -> None:
    out = Path(sys.argv[1])
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 240.0
    more = sys.argv[3:]
    command = " ".join(["python -m benchmarks.looking OUT", f"{seconds:g}", *more])
    rows = []
    for shape, overrides in SHAPES.items():
        steps_asked = max(8 * BLOCK, round(seconds / _GUESSED_STEP_SECONDS / (4 * BLOCK)) * 4 * BLOCK)
        config = compose_cell(last_wins([*COMMON, *overrides, f"measure.steps={steps_asked}", *more]))
        card = choose_card(config.device)
        folder = Path("multirun/looking").resolve() / shape
        steps, share = watched(config, card, folder)
        change, half, groups = effect(steps, sham=False)
        sham, sham_half, _ = effect(steps, sham=True)
        usual = statistics.median(seconds for _, _, seconds in steps)
        row = {"shape": shape, "steps": len(steps), "groups": groups, "step_seconds": usual, "cpu_share": share}
        rows.append(row | {"cost": change, "half": half, "sham": sham, "sham_half": sham_half, "times": steps})
        text = report(out, command, rows, environment() | device_facts(card))
    print(text)


def report(out: Path, command: str, rows: list[dict[str, Any]], tags: dict[str, str]) -> str:
    origin = provenance({"tags": tags}, command)
    lines = ["| shape | steps that count | groups | median step s | cost of looking, 95 % | sham | CPU while on |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cost, sham = (f"{row[key]:+.2%} ± {row[half]:.2%}" for key, half in (("cost", "half"), ("sham", "sham_half")))
        cells = [row["shape"], row["steps"], row["groups"], f"{row['step_seconds']:.4f}", cost, sham]
        lines.append("| " + " | ".join([*map(str, cells), f"{row['cpu_share']:.1%} of a core"]) + " |")
    text = "\n".join(lines)
    head = "\n".join(f"- {key}: {value}" for key, value in origin.items())
    out.mkdir(parents=True, exist_ok=True)
    (out / "looking.md").write_text(f"# What looking costs\n\n{head}\n\n{text}\n", encoding="utf-8")
    (out / "looking.json").write_text(json.dumps({"origin": origin, "rows": rows}) + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
