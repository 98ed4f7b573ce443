"""Train the same job by several settings, each once to its end and once killed and resumed, and compare the losses.

    python -m benchmarks.killed_jobs OUT [override ...]

The jobs run at the same time on one device, so their losses count, and no speed. A job is killed with SIGKILL, parent
and worker, once it has a complete checkpoint, and goes on by resume=true. OUT/killed_jobs.json has all losses.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.engine_losses import apart
from benchmarks.reports import markdown, provenance, write_report

_JOB = (
    *("data=lab_chat", "train=job", "train.epochs=1", "batch_size=4", "seq_len=512", "measure.answers=0"),
    *("train.checkpoint_every=20", "train.eval_every=20", "share_device=true", "tracking=none", "timeout_minutes=8"),
)
SETTINGS = {
    "eager": (),
    "liger": ("engine=liger",),
    "compile": ("engine=compile",),
    "graph": ("engine=graph",),
    "eager, fp16": ("precision=fp16",),
    "graph, fp16": ("engine=graph", "precision=fp16"),
    "eager, paged_adamw": ("optimizer=paged_adamw",),
    "eager, paged_adamw_32bit": ("optimizer=paged_adamw_32bit",),
    "eager, LoRA": ("method=lora",),
}
_NOTE = """Losses in nats per token. "apart" is the largest difference of a training step's losses. LoRA's base is
not in 4 bit, so it is not compared with eager's QLoRA."""
_PATIENCE = 400.0
"""Seconds until a checkpoint."""


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Start a trial in a process group of its own; its output goes into a file next to its folder."""
    command = [sys.executable, "-m", "lora_lab", "--config-dir", "benchmarks", *overrides, f"hydra.run.dir={folder}"]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def kill_once_saved(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Kill the trial's parent and worker once a checkpoint is complete."""
    due = time.monotonic() + _PATIENCE
    while not any(folder.glob("checkpoints/*/complete.json")):
        if process.poll() is not None or time.monotonic() > due:
            return
        time.sleep(0.05)
    with (folder / "events.jsonl").open(encoding="utf-8") as lines:
        worker = json.loads(next(lines))["pid"]
    for pid in (process.pid, worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def losses(folder: Path) -> dict[str, Any]:
    """Return the losses of a trial's record, or the end of what it printed if there is none."""
    if not (folder / "record.json").is_file():
        printed = folder.with_suffix(".log").read_text(encoding="utf-8")
        return {"outcome": "no record", "reason": printed[-300:], "tags": {}}
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"outcome": record["outcome"], "reason": record["tags"].get("reason", "")}
    for key in ("step/loss", "heldout/loss"):
        found[key] = [[point["step"], point["value"]] for point in record["series"] if point["key"] == key]
    return found | {"attempts": record["metrics"].get("job/attempts"), "tags": record["tags"]}


def both(name: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train by one setting, unbroken and killed at the same time."""
    settings = [*_JOB, *SETTINGS[name], *overrides]
    place = folder / name.replace(", ", "_")
    unbroken, killed = place.with_name(f"{place.name}_unbroken"), place.with_name(f"{place.name}_killed")
    first, second = start(unbroken, *settings), start(killed, *settings)
    kill_once_saved(killed, second)
    start(killed, "resume=true", "share_device=true", "tracking=none", "timeout_minutes=8").wait()
    first.wait()
    return {"unbroken": losses(unbroken), "killed": losses(killed)}


def table(found: dict[str, Any]) -> str:
    """Return how far each setting is from eager, and each resumed job from the unbroken one, and from which step on."""
    head = [
        "setting",
        "held-out loss after 20 steps -> at the end",
        "steps apart from eager's",
        "starts",
        "killed and unbroken, apart",
        "from step",
    ]
    rows: list[list[str]] = []
    for name, jobs in found.items():
        unbroken, killed = jobs["unbroken"], jobs["killed"]
        failed = [job for job in (unbroken, killed) if job["outcome"] != "finished"]
        if failed:
            rows.append([name, f"{failed[0]['outcome']}: {failed[0]['reason']}", "", "", ""])
            continue
        values = [[loss for _, loss in job["step/loss"]] for job in (found["eager"]["unbroken"], unbroken, killed)]
        from_eager, from_unbroken = apart(values[1], values[0]), apart(values[2], values[1])
        held = unbroken["heldout/loss"]
        differing = [step + 1 for step, (one, other) in enumerate(zip(*values[1:], strict=True)) if one != other]
        rows.append(
            [
                name,
                f"{held[0][1]:.3f} -> {held[-1][1]:.3f}",
                "" if "LoRA" in name else f"{from_eager['most']:.4f}",
                f"{killed['attempts']:.0f}",
                f"{from_unbroken['most']:.4f}",
                str(differing[0]) if differing else "none",
            ]
        )
    return f"{markdown(head, rows)}\n\n{_NOTE}"


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    folder = Path("multirun", f"killed_jobs_{os.getpid()}")
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(len(SETTINGS)) as pool:
        jobs = {name: pool.submit(both, name, folder, overrides) for name in SETTINGS}
        found = {name: job.result() for name, job in jobs.items()}
    tags = [job.pop("tags") for jobs in found.values() for job in jobs.values()]
    text = table(found)
    origin = provenance(tags[0], f"python -m benchmarks.killed_jobs OUT {' '.join(overrides)}".strip())
    write_report(out, "killed_jobs", "Jobs by several settings, killed and resumed", origin, text, {"jobs": found})
    print(text)


if __name__ == "__main__":
    main()
