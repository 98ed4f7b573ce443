"""docs/measurement.md's table of what it costs to raise embeddings, head and norms to fp32 under QLoRA."""

import statistics
from typing import Any

from benchmarks.peers.plan import TUTORIAL
from benchmarks.peers.stored import SUMMARISED
from benchmarks.peers.table import median
from benchmarks.reports import markdown, stored, where

HEAD = ["stack, shape", "raised", "tokens/s", "GPU work per step, ms", "allocated GiB", "card, date if stored, commit"]


def raising() -> str:
    """Return the table: each setting without raising, then with it."""
    return markdown(HEAD, [*_engine(), *_plain()])


def _engine() -> list[list[str]]:
    content = stored("h100/raise_to_fp32")
    cells: list[tuple[str, dict[str, Any]]] = content["cells"]
    rows = []
    for raised in ("false", "true"):
        found = [cell["metrics"] for name, cell in cells if name.endswith(raised)]
        rates = sorted(each["throughput/tokens_per_second"] for each in found)
        memory = statistics.median(each["vram/peak_allocated_gib"] for each in found)
        speeds = " and ".join(f"{rate:,.0f}" for rate in rates)
        name = "`eager`, 1x512, fp16, checkpointing"
        rows.append([name, _yes(raised == "true"), speeds, "-", f"{memory:.2f}", where(content["origin"])])
    return rows


def _plain() -> list[list[str]]:
    content = stored(SUMMARISED["Qwen2.5-1.5B"])
    rows = []
    for cell, results in content["cells"].items():
        if TUTORIAL not in results:
            continue
        for name in ("plain", TUTORIAL):
            turns = results[name]["turns"]
            speed, work, memory = (
                median(turns, key) for key in ("tokens_per_second", "kernel_seconds", "peak_allocated_gib")
            )
            assert speed is not None
            assert work is not None
            assert memory is not None
            figures = [f"{speed:,.0f}", f"{1e3 * work:.0f}", f"{memory:.2f}"]
            rows.append([f"plain HF, {cell}, bf16", _yes(name == TUTORIAL), *figures, where(content["origins"][cell])])
    return rows


def _yes(raised: bool) -> str:
    return "yes" if raised else "no"
