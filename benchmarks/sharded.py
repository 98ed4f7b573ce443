"""Train models over two cards whose frozen weights are shared out (placement=fsdp): tokens/s, memory by card, and the
share of the weights that a card holds.

    python -m benchmarks.sharded OUT [--only WORD] [--seconds 540] [--rehearse]

Each trial is a command of its own, alone on the host, with random weights. Writes OUT/sharded.json after every trial;
none begins after --seconds. `ddp` has the same step with a copy of the model on each card, to compare.
--rehearse runs a tiny model with two workers on the CPU.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.data_parallel import COMMON, run
from benchmarks.reports import markdown, provenance, stored
from lora_lab.files import write_json

_STEPS = ["batch_size=1", "seq_len=2048", "data.rows=64", "measure.warmup_steps=3", "measure.steps=12"]
_8B = [*COMMON, *_STEPS, "model=llama3_1_8b", "method=lora", "precision=bf16", "engine.chunked_loss=true"]
_32B = [
    *(*COMMON, *_STEPS, "model=qwen2_5_1_5b", "method=qlora", "precision=bf16", "engine.chunked_loss=true"),
    "model.architecture.vocab_size=152064",
    "model.architecture.hidden_size=5120",
    "model.architecture.intermediate_size=27648",
    "model.architecture.num_hidden_layers=64",
    "model.architecture.num_attention_heads=40",
    "model.architecture.num_key_value_heads=8",
    "model.architecture.tie_word_embeddings=false",
]
"""The shapes of Qwen2.5-32B."""

_FULL = "gradient_checkpointing=full"
CELLS = {
    "8B lora eager": [*_8B, _FULL, "engine=eager", "placement=fsdp"],
    "8B lora compile": [*_8B, _FULL, "engine=compile", "placement=fsdp"],
    "8B lora ddp": [*_8B, _FULL, "engine=eager", "placement=ddp"],
    "32B qlora eager": [*_32B, _FULL, "engine=eager", "placement=fsdp"],
    "32B qlora compile": [*_32B, _FULL, "engine=compile", "placement=fsdp"],
}
_TINY = [
    *COMMON,
    "model=tiny",
    "device=cpu",
    "share_device=true",
    "data.rows=60",
    "batch_size=2",
    "seq_len=64",
    "measure=quick",
]
_REHEARSED = {
    "tiny lora": [*_TINY, "method=lora", _FULL, "placement=fsdp"],
    "tiny qlora": [*_TINY, "method=qlora", "placement=fsdp"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    due = time.monotonic() + asked.seconds
    number = "workers" if asked.rehearse else "gpus"
    content: dict[str, Any] = {"origin": {}, "trials": {}}
    for cell, overrides in (_REHEARSED if asked.rehearse else CELLS).items():
        if asked.only not in cell:
            continue
        if time.monotonic() > due:
            print(f"no time is left for {cell}", flush=True)
            continue
        found = run(f"sharded-{cell.replace(' ', '_')}", [*overrides, f"placement.{number}=2"])
        tags = found.pop("tags")
        content["origin"] = provenance(tags, "python -m benchmarks.sharded") if tags else {}
        content["trials"][cell] = {**found, "ran": tags}
        write_json(asked.out / "sharded.json", content)
        print(cell, found["outcome"], tags.get("reason", ""), f"{found['seconds']:.0f} s", flush=True)
        print("  tokens/s", found["metrics"].get("throughput/tokens_per_second"))
        print("  GiB by card, allocated", tags.get("vram_by_card.allocated_gib"), end="; ")
        print("reserved", tags.get("vram_by_card.reserved_gib"))
        print("  weights held, of all", tags.get("ran.base_bytes_held"), share_held(tags), flush=True)


def table() -> str:
    """Return docs/scale.md's table, from the stored trials."""
    content = stored("h200/sharded")
    lines = []
    for cell, trial in content["trials"].items():
        tags, speed = trial["ran"], trial["metrics"].get("throughput/tokens_per_second")
        reserved = tags.get("vram_by_card.reserved_gib", "").replace(", ", " / ") or "-"
        lines.append([cell, trial["outcome"], share_held(tags) or "-", reserved, f"{speed:,.0f}" if speed else "-"])
    head = ["trial", "outcome", "weights that a card holds, of all", "reserved GiB by card", "tokens/s"]
    commits = ", ".join(sorted({trial["commit"][:7] for trial in content["trials"].values()}))
    return f"{markdown(head, lines)}\n\nMeasured on {content['origin']['device']}, commits {commits}."


def share_held(tags: dict[str, str]) -> str:
    """Return the share of the frozen weights that the worker with most of them holds; nothing where it was not read."""
    held, _, whole = tags.get("ran.base_bytes_held", "").partition(" of ")
    return f"{int(held) / int(whole):.3f}" if whole else ""


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
