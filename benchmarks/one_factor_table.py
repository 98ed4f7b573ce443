"""docs/paper.md's table of one setting changed at a time, from one_factor.json."""

from typing import Any

from benchmarks.reports import markdown, stored, where
from lora_lab.telemetry.metrics import metric

KEYS = (
    "throughput/tokens_per_second",
    "vram/peak_allocated_gib",
    "vram/peak_device_gib",
    "energy/joules_per_token",
)
HEAD = ["change from adamw fp16 qlora 1x512", "tokens/s", "allocated GiB", "card GiB", "J/token"]
LEFT_OUT = ("adamw_fused", "8bit", "32bit", "adafactor", "dora", "fp4", "raise")
"""Parts of the names of cells that the page has no room for."""


def one_factor() -> str:
    """Return the table."""
    content = stored("h100/one_factor")
    cells: list[tuple[str, dict[str, Any]]] = content["cells"]
    shown = [(name, cell) for name, cell in cells if not any(part in name for part in LEFT_OUT)]
    rows = [
        [name.replace("=false", "=none"), *(metric(key).form.format(cell["metrics"][key]) for key in KEYS)]
        for name, cell in shown
    ]
    rates = [cell["metrics"][KEYS[0]] for name, cell in cells if name.startswith(("start", "optimizer"))]
    return (
        f"{markdown(HEAD, rows)}\n\nMeasured on {where(content['origin'])}. All "
        f"{len(rates)} optimizers lie between {min(rates):,.0f} and {max(rates):,.0f} tokens/s."
    )
