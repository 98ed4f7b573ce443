"""docs/measurement.md's tables of what was checked: FLOPs, the matrix rate, paging, sampling, overhead."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.reports import RESULTS, date, markdown, stored, where
from lora_lab.store.packed_runs import SHIPPED, PackedRuns
from lora_lab.store.stored_runs import StoredRuns

RATE = "flops/matmul_tflop_per_second"
PARTS = ("products", "attention", "recomputation", "total")


def flop_check() -> str:
    """Return by how much formula and torch's count differ, part by part."""
    rows = []
    for model, name in (("Qwen2.5-1.5B, LoRA, 12 key-value heads", "h100"), ("SmolLM2-135M, LoRA", "cpu")):
        content = stored(f"{name}/flop_check")
        differs = [f"{100 * worst_flops(content, part):.2f} %" for part in PARTS]
        rows.append([model, str(len(content["cells"])), *differs, where(content["origin"])])
    return markdown(["model", "cells", *(f"{part}, at most" for part in PARTS), "card, commit"], rows)


def worst_flops(content: dict[str, Any], part: str) -> float:
    """Return the largest difference of a part in any cell, as a share of torch's count."""
    return max(abs(cell["differs"][part]) for cell in content["cells"])


def matmul_rate() -> str:
    """Return what the cards of the stored trials reached in matrix products: one measurement for each card and
    precision."""
    rates: dict[tuple[str, str], tuple[float, str, str]] = {}
    for precision, card, commit, metrics, started_ms in _trials():
        if RATE in metrics:
            rates.setdefault((precision, card), (metrics[RATE], date(started_ms), commit[:7]))
    rows = []
    for precision in sorted({precision for precision, _ in rates}):
        here = [found for (of, _), found in rates.items() if of == precision]
        speeds, days, commits = zip(*here, strict=True)
        days_range = " to ".join(dict.fromkeys((min(days), max(days))))
        where_from = f"{days_range}, commits {', '.join(dict.fromkeys(commits))}"
        rows.append([precision, str(len(here)), f"{min(speeds):.0f} to {max(speeds):.0f}", where_from])
    return markdown(["precision", "NVIDIA H100 80GB HBM3 cards", "TFLOP/s, lowest to highest", "date, commit"], rows)


def _trials() -> Iterator[tuple[str, str, str, Mapping[str, float], int]]:
    """Yield precision, card, commit, metrics and start of every stored trial on an H100 that has all its figures."""
    for path in (RESULTS / "h100/factorial.jsonl.gz", RESULTS / "h100/engines.jsonl.gz", SHIPPED):
        for trial in StoredRuns(PackedRuns(path)).runs()[0]:
            yield trial.params["precision"], trial.place.unit, trial.tags["commit"], trial.metrics, trial.started_ms
    for name, rows in (("steady_gpu_bound", "runs"), ("steady_host_bound", "runs"), ("paged", "rows")):
        content = stored(f"h100/{name}")
        origin = content["origin"]
        for row in content[rows]:
            record = row["record"]
            precision, started_ms = record["params"]["precision"], record["started_ms"]
            yield precision, origin["device.uuid"], origin["commit"], record["metrics"], started_ms


def paged() -> str:
    """Return what was paged, and what the rule says."""
    content = stored("h100/paged")
    rows = []
    for row in content["rows"]:
        metrics = row["record"]["metrics"]
        live, card, process = (
            1024 * metrics[key] for key in ("vram/optimizer_paged_gib", "vram/peak_device_gib", "vram/peak_process_gib")
        )
        rule = row["predicted_bytes"] / 2**20
        rows.append([str(row["rank"]), row["optimizer"], f"{rule:.2f}", f"{live:.2f}", f"{card - process:,.1f}"])
    head = ["rank", "optimizer", "paged by the rule, MiB", "paged, MiB", "card less process, MiB"]
    made = where(content["origin"], content["rows"][0]["record"]["started_ms"])
    return f"{markdown(head, rows)}\n\nMeasured on {made}."


def looking() -> str:
    """Return what the sampler costs."""
    content = stored("h100/looking")
    rows = [
        [
            row["shape"],
            f"{1e3 * row['reading_seconds']:.1f} ms",
            *(
                f"{100 * row[key]:+.2f} % ± {100 * row[f'{key}_half']:.2f} %"
                for key in ("cost_of_readings", "sham", "cost_by_blocks")
            ),
        ]
        for row in content["rows"]
    ]
    head = ["shape", "one reading", "slowed by sampling", "control without samples", "by whole two-second blocks"]
    return f"{markdown(head, rows)}\n\nMeasured on {where(content['origin'])}; 95 % intervals."


def overhead() -> str:
    """Return the overhead of a trial in a sweep, of lora_lab and of a plain Hydra sweep."""
    rows = []
    for name in ("h100", "cpu"):
        content = stored(f"{name}/overhead")
        texts = []
        for side in ("lora_lab", "plain Hydra"):
            later = [trial["overhead"] for ran in content["seconds"][side] for trial in ran[1:]]
            texts.append(f"{statistics.median(later):.2f} ({min(later):.2f} to {max(later):.2f})")
        rows.append([*texts, where(content["origin"])])
    return markdown(["lora_lab, s", "plain Hydra `-m`, s", "machine, commit"], rows)
