"""Trials by the real command line, one process each, and the tables of what they left.

    python -m benchmarks.command_line OUT [NAME]

NAME is one of SETS; without it, all of them.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.cells import write

_QWEN = (
    "model=qwen2_5_1_5b model.weights=random data=random_tokens data.rows=128 measure.warmup_steps=3 measure.steps=12 "
    "measure.eval_rows=0 gradient_checkpointing=full optimizer=adamw precision=fp16 batch_size=1 seq_len=512 "
)
SETS = {
    "smollm2": (
        "The default trial: SmolLM2-135M-Instruct, real weights, the shipped data",
        [
            "optimizer=paged_adamw precision=fp16",
            "data.batching=longest measure.steps=40",
            "data.batching=seq_len measure.steps=40",
            "data.batching=packed measure.steps=40",
        ],
    ),
    "raise_to_fp32": (
        "The cost of raising non-quantised weights to fp32, Qwen2.5-1.5B shapes",
        [_QWEN + f"method.raise_to_fp32={raised}" for raised in ("false", "true", "false", "true")],
    ),
}


def main() -> None:
    out = Path(sys.argv[1])
    for name in sys.argv[2:] or SETS:
        title, commands = SETS[name]
        rows = []
        for number, overrides in enumerate(commands):
            folder = Path("multirun").resolve() / name / str(number)
            subprocess.run(
                [sys.executable, "-m", "lora_lab", *overrides.split(), f"hydra.run.dir={folder}"], check=False
            )
            record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            record.pop("folder")
            rows.append((overrides.removeprefix(_QWEN), record))
            text = write(out, name, title, f"python -m benchmarks.command_line OUT {name}", rows)
        print(text)


if __name__ == "__main__":
    main()
