"""What a paged optimizer really pages, beside the rule and beside the card's own reading.

    python -m benchmarks.paged OUT [override ...]

Rule: bitsandbytes pages the two states of a parameter with at least 100,000 elements: 1 byte an element each with
8 bits and 4 with 32. Predicted from the shapes of the adapters that the trial saved. `other` is what the card shows
beyond torch's allocator and the paged bytes; if it stays what it is for an optimizer that pages nothing, the paged
bytes explain the reading. Random weights and tokens at Qwen2.5-1.5B's shapes.
"""

import math
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.cells import provenance, run_cell, write_report
from benchmarks.one_factor import last_wins

RANKS = (8, 16, 64)
OPTIMIZERS = {"adamw_fused": 0, "paged_adamw": 2, "paged_adamw_32bit": 8}
"""Bytes of paged state an element."""
COMMON = [
    "model=qwen2_5_1_5b",
    "model.weights=random",
    "data=random_tokens",
    "data.rows=64",
    "measure.warmup_steps=3",
    "measure.steps=8",
    "measure.eval_rows=0",
    "measure.profile_steps=0",
    "measure.idle_seconds=0",
    "tracking=none",
    "batch_size=1",
    "seq_len=512",
]
COLUMNS = (
    ("eligible MiB", "vram/optimizer_eligible_gib"),
    ("state MiB", "vram/optimizer_gib"),
    ("card, peak MiB", "vram/steady_device_gib"),
    ("process, peak MiB", "vram/steady_process_gib"),
    ("allocator, peak MiB", "vram/steady_reserved_gib"),
    ("other MiB", "vram/other_gib"),
)
_MIB_IN_GIB = 1024


def predicted_bytes(adapter: Path, bytes_per_element: int) -> int:
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as tensors:
        sizes = [math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
    return sum(size for size in sizes if size >= 100_000) * bytes_per_element


def main() -> None:
    out, more = Path(sys.argv[1]), sys.argv[2:]
    command = " ".join(["python -m benchmarks.paged OUT", *more])
    rows: list[dict[str, Any]] = []
    for rank in RANKS:
        for optimizer, size in OPTIMIZERS.items():
            folder = Path("multirun/paged").resolve() / f"{optimizer}_{rank}"
            asked = [*COMMON, f"method.rank={rank}", f"optimizer={optimizer}", *more]
            record = run_cell(last_wins(asked), folder)
            del record["series"]
            rows.append(
                {
                    "rank": rank,
                    "optimizer": optimizer,
                    "predicted_bytes": predicted_bytes(folder / "adapter", size),
                    "record": record,
                }
            )
            text = report(out, command, rows)
    print(text)


def report(out: Path, command: str, rows: list[dict[str, Any]]) -> str:
    origin = provenance(rows[0]["record"], command)
    head = ["rank", "optimizer", "paged, rule MiB", "paged, live MiB", "tensors", *(title for title, _ in COLUMNS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        metrics = row["record"]["metrics"]

        def mib(key: str, metrics: dict[str, float] = metrics) -> str:
            return f"{metrics[key] * _MIB_IN_GIB:,.2f}" if key in metrics else "-"

        cells = [str(row["rank"]), row["optimizer"], f"{row['predicted_bytes'] / 2**20:,.2f}"]
        cells += [mib("vram/optimizer_paged_gib"), f"{metrics.get('vram/optimizer_paged_tensors', 0):.0f}"]
        lines.append("| " + " | ".join([*cells, *(mib(key) for _, key in COLUMNS)]) + " |")
    told = {row["record"]["tags"]["warnings"] for row in rows if "warnings" in row["record"]["tags"]}
    text = "\n".join([*lines, "", *(f"- warned: {warning}" for warning in sorted(told))])
    write_report(out, "paged", "What is paged", origin, text, {"rows": rows})
    return text


if __name__ == "__main__":
    main()
