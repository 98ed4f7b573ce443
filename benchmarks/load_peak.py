"""What loading takes: random weights beside the same shapes from safetensors, under QLoRA, and on emulated small cards.

    python -m benchmarks.load_peak OUT [override ...]

Random weights stand for real ones in every measurement without a download, so loading must need no more memory. The
files are written from the same shapes in bf16 (16 GB for the 8B model). Each cell is a trial of its own.
Further overrides replace those below (model=tiny for a rehearsal on a CPU, which reads no memory).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.cells import run_cell, write
from benchmarks.one_factor import last_wins

COMMON = [
    "model=llama3_1_8b",
    "model.weights=random",
    "method=qlora",
    "data=random_tokens",
    "data.rows=64",
    "measure.warmup_steps=2",
    "measure.steps=5",
    "measure.eval_rows=0",
    "measure.idle_seconds=0",
    "tracking=none",
    "gradient_checkpointing=full",
    "optimizer=adamw_8bit",
    "precision=bf16",
    "batch_size=1",
    "seq_len=2048",
]
SAVE = """
import sys, torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer
fields = OmegaConf.to_container(OmegaConf.load(sys.argv[1]))["architecture"]
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="4GB")
tiny_tokenizer().save_pretrained(sys.argv[2])
"""


def main() -> None:
    out, more = Path(sys.argv[1]), sys.argv[2:]
    asked = last_wins([*COMMON, *more])
    model = next(o for o in asked if o.startswith("model=")).removeprefix("model=")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", SAVE, f"conf/model/{model}.yaml", folder], check=True)
        files = [o for o in asked if not o.startswith("model")] + ["model=local", f"model.path={folder}"]
        cells = {
            "random weights": asked,
            "from safetensors": files,
            "random weights, again": asked,
            "random weights, capacity=12gib": [*asked, "capacity=12gib"],
            "from safetensors, capacity=12gib": [*files, "capacity=12gib"],
            "random weights, capacity=8gib": [*asked, "capacity=8gib"],
        }
        for number, (name, overrides) in enumerate(cells.items()):
            record = run_cell(overrides, Path("multirun/load_peak").resolve() / str(number))
            record.pop("series")
            peaks = {key: value for key, value in record["metrics"].items() if "peak" in key or "load" in key}
            print(name, record["outcome"], record["tags"].get("reason", ""), peaks, flush=True)
            rows.append((name, record))
            write(
                out, "load_peak", "Loading under QLoRA", " ".join(["python -m benchmarks.load_peak OUT", *more]), rows
            )


if __name__ == "__main__":
    main()
