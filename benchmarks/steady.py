"""Can the figures of a trial be believed? The same minute-long trial five times over.

    python -m benchmarks.steady OUT NAME [override ...]

NAME is one of SHAPES. Of each trial: the energy counter beside the integral of power; of all: the spread of tokens/s
and J/token. And each window is cut into parts of at least 5 s at the ends of steps: how far is a part's J/token
from that of its whole window? Random weights and tokens at Qwen2.5-1.5B's shapes.
"""

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cells import provenance, run_cell, write_report
from benchmarks.one_factor import last_wins
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.telemetry.energy import window_energy
from lora_lab.telemetry.window import Window, find_window, steady

REPEATS = 5
PART_SECONDS = 5.0
COMMON = [
    "model=qwen2_5_1_5b",
    "model.weights=random",
    "data=random_tokens",
    "data.rows=128",
    "measure.warmup_steps=5",
    "measure.eval_rows=0",
    "tracking=none",
]
SHAPES = {
    "host_bound": ["batch_size=1", "seq_len=512", "measure.steps=200"],
    "gpu_bound": ["batch_size=8", "seq_len=2048", "gradient_checkpointing=full", "measure.steps=50"],
}
SPREAD = (
    ("tokens/s", "throughput/tokens_per_second", "{:,.1f}"),
    ("J/token", "energy/joules_per_token", "{:.5f}"),
    ("net J/token", "energy/net_joules_per_token", "{:.5f}"),
)
COLUMNS = (
    ("window s", "window/seconds", "{:.1f}"),
    ("tokens/s", "throughput/tokens_per_second", "{:,.1f}"),
    ("± in the window", "throughput/tokens_per_second_error", "{:,.1f}"),
    ("GPU busy", "throughput/gpu_busy_share", "{:.1%}"),
    ("MFU", "flops/mfu", "{:.2%}"),
    ("J/token", "energy/joules_per_token", "{:.5f}"),
    ("± bound", "energy/joules_per_token_error", "{:.5f}"),
    ("counter J", "energy/joules", "{:,.1f}"),
    ("integral of power J", "energy/power_integral_joules", "{:,.1f}"),
    ("apart", "energy/power_disagreement", "{:+.2%}"),
    ("idle W", "energy/idle_watts", "{:.1f}"),
    ("net J/token", "energy/net_joules_per_token", "{:.5f}"),
    ("sampler's share of a core", "sampler/cpu_share", "{:.1%}"),
    ("drift, degrees", "card/temperature_drift_celsius", "{:+.0f}"),
)


def parts(window: Window) -> Iterator[Window]:
    """Consecutive parts of at least PART_SECONDS; what is left at the end is left out."""
    first = 0
    for last in range(len(window.steps)):
        part = window.part(first, last + 1 - first)
        if part.seconds >= PART_SECONDS:
            yield part
            first = last + 1


def deviations(folder: Path) -> list[float]:
    """J/token of each part over that of the whole window, less 1."""
    events, samples, _, _ = TrialFolder(folder).read_inputs()
    found = find_window(events)
    if found is None:
        return []
    whole = steady(found)

    def joules_per_token(window: Window) -> float | None:
        joules = window_energy(window.start, window.end, samples).joules
        return None if joules is None else joules / sum(step.real for step in window.steps)

    usual = joules_per_token(whole)
    each = [joules_per_token(part) for part in parts(whole)]
    return [] if usual is None else [figure / usual - 1 for figure in each if figure is not None]


def main() -> None:
    out, name, more = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    command = " ".join(["python -m benchmarks.steady OUT", name, *more])
    runs: list[dict[str, Any]] = []
    for number in range(REPEATS):
        folder = Path("multirun/steady").resolve() / name / str(number)
        record = run_cell(last_wins([*COMMON, *SHAPES[name], *more]), folder)
        del record["series"]
        runs.append({"record": record, "parts": deviations(folder)})
        text = report(out, name, command, runs)
    print(text)


def report(out: Path, name: str, command: str, runs: list[dict[str, Any]]) -> str:
    """NAME.md and NAME.json."""
    origin = provenance(runs[0]["record"], command)
    lines = ["| run | outcome | validity | " + " | ".join(title for title, _, _ in COLUMNS) + " |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 3))
    for number, run in enumerate(runs, 1):
        metrics, tags = run["record"]["metrics"], run["record"]["tags"]
        cells = [form.format(metrics[key]) if key in metrics else "-" for _, key, form in COLUMNS]
        lines.append("| " + " | ".join([str(number), run["record"]["outcome"], tags["validity"], *cells]) + " |")
    lines += [
        "",
        "| over the runs | median | lowest | highest | (highest - lowest) / median |",
        "|---|---|---|---|---|",
    ]
    for title, key, form in SPREAD:
        told = [run["record"]["metrics"][key] for run in runs if key in run["record"]["metrics"]]
        if told:
            low, middle, high = min(told), statistics.median(told), max(told)
            cells = [form.format(value) for value in (middle, low, high)]
            lines.append("| " + " | ".join([title, *cells, f"{(high - low) / middle:.2%}"]) + " |")
    all_parts = [abs(deviation) for run in runs for deviation in run["parts"]]
    if all_parts:
        lines += [
            "",
            f"{len(all_parts)} parts of at least {PART_SECONDS:g} s: their J/token is off their window's by "
            f"{statistics.median(all_parts):.2%} in the median, {max(all_parts):.2%} at most; "
            f"{sum(part <= 0.01 for part in all_parts)} of them by 1 % or less.",
        ]
    text = "\n".join(lines)
    write_report(out, f"steady_{name}", f"The same trial again: {name}", origin, text, {"runs": runs})
    return text


if __name__ == "__main__":
    main()
