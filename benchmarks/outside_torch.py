"""Measure what a process takes of a card outside of torch's allocator, after each step that loads something more.

    python -m benchmarks.outside_torch OUT

Writes OUT/outside_torch.json. Nothing else may use the card meanwhile.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reports import markdown, stored
from lora_lab.files import write_json
from lora_lab.store.environment import device_facts, environment
from lora_lab.trial.devices import choose_placement


def _steps() -> dict[str, Callable[[], Any]]:
    import bitsandbytes.functional as bnb
    import torch

    def made(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def attention() -> None:
        q = made(1, 8, 512, 64).requires_grad_()
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    def optimizer() -> None:
        parameter = torch.nn.Parameter(torch.randn(1000, 1000, device="cuda"))
        parameter.grad = torch.randn_like(parameter)
        torch.optim.AdamW([parameter], fused=True).step()

    def second_stream() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            made(1024, 1024) @ made(1024, 1024)

    return {
        "CUDA context": lambda: torch.zeros(1, device="cuda"),
        "a product (cuBLAS)": lambda: made(1024, 1024) @ made(1024, 1024),
        "attention, forward and backward": attention,
        "4 bit and back (bitsandbytes)": lambda: bnb.dequantize_4bit(*bnb.quantize_4bit(made(1024, 1024))),
        "a compiled kernel": lambda: torch.compile(torch.nn.functional.silu)(made(1024, 1024)),
        "fused AdamW": optimizer,
        "a product on a second stream": second_stream,
    }


def main() -> None:
    import pynvml
    import torch

    out = Path(sys.argv[1])
    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByIndex(0)
    facts = {**environment(), **device_facts(choose_placement("auto"))}
    facts["commit"] = os.environ.get("LORA_LAB_COMMIT", facts["commit"])  # where only the files are
    before = pynvml.nvmlDeviceGetMemoryInfo(card).used
    found = {}
    for name, run in _steps().items():
        run()
        torch.cuda.synchronize()
        found[name] = pynvml.nvmlDeviceGetMemoryInfo(card).used - before - torch.cuda.memory_reserved()
    write_json(out / "outside_torch.json", {"origin": facts, "bytes": found})


def table() -> str:
    """Return docs/small_cards.md's table, from the stored measurement."""
    content = stored("h200/outside_torch")
    lines = [[name, f"{size / 2**20:.0f}"] for name, size in content["bytes"].items()]
    origin = content["origin"]
    text = markdown(["after", "MiB outside of torch"], lines)
    return (
        f"{text}\n\nMeasured on an {origin['device']}, driver {origin['device.driver']}, commit {origin['commit'][:7]}."
    )


if __name__ == "__main__":
    main()
