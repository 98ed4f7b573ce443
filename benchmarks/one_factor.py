"""One factor at a time at Qwen2.5-1.5B's real shapes, and the three runs of arXiv 2509.12229.

    python -m benchmarks.one_factor OUT [override ...]

Random weights and random tokens of exactly seq_len: the same speed and memory as real ones, no download. Each
cell differs from the first in one factor; the first is run again at the end, to show the noise. The paper does
not state rank, learning rate or what else was raised to fp32: this project's defaults stand in.
Further overrides replace those below (model=tiny for a rehearsal on a CPU).
"""

import sys
from pathlib import Path

from benchmarks.cells import run_cell, write

COMMON = [
    "model=qwen2_5_1_5b",
    "model.weights=random",
    "data=random_tokens",
    "data.rows=128",
    "measure.warmup_steps=3",
    "measure.steps=12",
    "measure.eval_rows=0",
    "tracking=none",
    "gradient_checkpointing=full",
    "optimizer=adamw",
    "precision=fp16",
    "batch_size=1",
    "seq_len=512",
]
CELLS = {
    "start: adamw fp16 qlora 1x512": "",
    "optimizer=adamw_fused": "optimizer=adamw_fused",
    "optimizer=adamw_8bit": "optimizer=adamw_8bit",
    "optimizer=paged_adamw": "optimizer=paged_adamw",
    "optimizer=paged_adamw_32bit": "optimizer=paged_adamw_32bit",
    "optimizer=adafactor": "optimizer=adafactor",
    "optimizer=lion_8bit": "optimizer=lion_8bit",
    "precision=bf16": "precision=bf16",
    "precision=fp32": "precision=fp32",
    "method=lora": "method=lora",
    "method=dora": "method=dora",
    "method=qlora_fp4": "method=qlora_fp4",
    "method.raise_to_fp32=true": "method.raise_to_fp32=true",
    "batch_size=2": "batch_size=2",
    "seq_len=2048": "seq_len=2048",
    "gradient_checkpointing=none": "gradient_checkpointing=none",
    "paper run 2: paged_adamw fp16 2x2048": "optimizer=paged_adamw batch_size=2 seq_len=2048",
    "paper run 3: paged_adamw bf16 2x1024": "optimizer=paged_adamw precision=bf16 batch_size=2 seq_len=1024",
    "paper run 1 (the start, again): adamw fp16 1x512": "",
}


def last_wins(overrides: list[str]) -> list[str]:
    """Hydra refuses a group that is chosen twice."""
    return list({override.split("=")[0]: override for override in overrides}.values())


def main() -> None:
    out, more = Path(sys.argv[1]), sys.argv[2:]
    command = " ".join(["python -m benchmarks.one_factor OUT", *more])
    rows = []
    for number, (name, changes) in enumerate(CELLS.items()):
        overrides = last_wins([*COMMON, *more, *changes.split()])
        record = run_cell(overrides, Path("multirun/one_factor").resolve() / str(number))
        record.pop("series")
        rows.append((name, record))
        text = write(out, "one_factor", "One factor at a time", command, rows)
    print(text)


if __name__ == "__main__":
    main()
