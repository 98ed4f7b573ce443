"""The sweep presets by the real command line, on the whole card and on an emulated smaller one.

    python -m benchmarks.presets OUT NAME [override ...]

NAME is one of SETS. Random weights and tokens at Qwen2.5-1.5B's shapes: the same speed and memory as real ones, no
download. Writes NAME.md for people and NAME.json with the figures of every trial.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.cells import provenance
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.sweep.display import write_table

_QWEN = (
    "model.weights=random data=random_tokens data.rows=128 measure.warmup_steps=3 measure.steps=12 "
    "measure.eval_rows=0 timeout_minutes=5"
)
SETS = {
    "paper": "sweep=paper",
    "paper_8gib": "sweep=paper capacity=8gib",
    "paper_factorial_8gib": "sweep=paper_factorial capacity=8gib",
}
COLUMNS = (
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
    ("step s (median)", "throughput/step_seconds_p50", "{:.3f}"),
    ("allocated GiB", "vram/peak_allocated_gib", "{:.2f}"),
    ("card GiB", "vram/peak_device_gib", "{:.2f}"),
    ("J/token", "energy/joules_per_token", "{:.4f}"),
    ("asked for GiB", "out_of_memory/asked_gib", "{:.2f}"),
    ("card before", "card/used_before_gib", "{:.2f}"),
    ("card after", "card/used_after_gib", "{:.2f}"),
)


def report(folder: Path, out: Path, name: str, command: str, note: str) -> None:
    """NAME.md and NAME.json from what a sweep left in `folder`."""
    sweep = SweepFolder(folder)
    trials = sweep.read().trials
    table = folder / "trials.csv"
    write_table(table, trials, [sweep.attempt(trial) for trial in trials])
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| trial | repeat | outcome | " + " | ".join(title for title, _, _ in COLUMNS) + " |"]
    lines.append("|" + "---|" * (3 + len(COLUMNS)))
    for row in rows:
        figures = [form.format(float(row[key])) if row.get(key) else "-" for _, key, form in COLUMNS]
        lines.append("| " + " | ".join([row["trial"], row["repeat"], row["outcome"], *figures]) + " |")
    reasons = [f"- {row['trial']} #{row['repeat']}: {row['reason']}" for row in rows if row["reason"]]
    tags = json.loads(next(folder.glob("[0-9]*/environment.json")).read_text(encoding="utf-8"))
    keep = {key: value for key, value in tags.items() if key != "folder"}
    origin = provenance({"tags": keep}, command) | {"ended": note}
    head = "\n".join(f"- {key}: {value}" for key, value in origin.items())
    text = "\n\n".join([f"# {SETS[name]}", head, "\n".join(lines), "\n".join(reasons)])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    written = json.dumps({"origin": origin, "trials": rows}, indent=1)
    (out / f"{name}.json").write_text(written + "\n", encoding="utf-8")


def main() -> None:
    out, name, more = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    folder = Path("multirun/presets").resolve() / name
    asked = [*SETS[name].split(), *_QWEN.split(), *more]
    command = [sys.executable, "-m", "lora_lab", *asked, f"hydra.sweep.dir={folder}"]
    code = subprocess.run(command, check=False).returncode
    report(folder, out, name, " ".join(["python -m lora_lab", *asked]), f"exit code {code}")


if __name__ == "__main__":
    main()
