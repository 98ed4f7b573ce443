"""Compare what paged optimizers paged in the trials of benchmarks/sweep/paged.yaml with bitsandbytes' own rule.

    python -m benchmarks.paged SWEEP OUT

SWEEP is the sweep's folder. The rule: bitsandbytes pages the two states of a parameter with at least 100,000 elements,
1 byte per element each with 8 bits and 4 with 32. The shapes are those of the adapters that the trial saved. `other`
is what the card shows beyond torch's allocator and the paged bytes: where it is the same as for an optimizer that pages
nothing, the paged bytes explain the card's reading.
"""

import math
import sys
from pathlib import Path

from safetensors import safe_open

from benchmarks.reports import finished_trials, markdown, provenance, write_report

STATE_BYTES = {"adamw_fused": 0, "paged_adamw": 2, "paged_adamw_32bit": 8}
"""Bytes of paged state per element."""
_PAGED_FROM = 100_000
_MIB_IN_GIB = 1024


def paged_by_rule(adapter: Path, optimizer: str) -> float:
    """Return the GiB that the rule pages."""
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as tensors:
        sizes = [math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118  no mapping
    return sum(size for size in sizes if size >= _PAGED_FROM) * STATE_BYTES[optimizer] / 2**30


def main() -> None:
    sweep, out = map(Path, sys.argv[1:])
    found, tags = {}, {}
    for folder, record in finished_trials(sweep):
        rule = paged_by_rule(folder.path / "adapter", record.params["optimizer"])
        measured = {
            "paged": record.metrics.get("vram/optimizer_paged_gib"),
            "other": record.metrics.get("vram/other_gib"),
        }
        found[record.name], tags = {"rule": rule, **measured}, record.tags
    rows = [
        [name, *("-" if gib is None else f"{gib * _MIB_IN_GIB:,.2f}" for gib in figures.values())]
        for name, figures in found.items()
    ]
    text = markdown(["point", "paged by the rule, MiB", "paged, MiB", "other, MiB"], rows)
    origin = provenance(tags, "python -m benchmarks.paged SWEEP OUT")
    write_report(out, "paged_rule", "What is paged, and what the rule says", origin, text, {"gib": found})
    print(text)


if __name__ == "__main__":
    main()
