"""The formula of telemetry/flops.py beside torch's own count of a trial's forward and backward.

    python -m benchmarks.flop_check OUT [override ...]

One optimizer step of Trainer with the trial's model, data and adapters (method=lora, random weights) under
torch.utils.flop_counter.FlopCounterMode, with each gradient_checkpointing: none, full and selective. That counts no
4-bit product and, on a CPU, no fused attention: so LoRA, and there attention=eager. It counts causal attention as whole
squares; so does the formula here. Exits with 1 when a part differs by more than 2 %.

The formula takes every product to need its input's gradient. Without checkpointing the first layer's q, k and v need
none (with it, transformers lets the embeddings' output ask for one): 0.2 % of SmolLM2-135M's products, but 4 % of the
two-layer tiny model's, which this check is therefore not for.

On a GPU the counter stops at fused attention whose heads share keys and values, so there each head gets its own:
    python -m benchmarks.flop_check OUT model=qwen2_5_1_5b model.architecture.num_key_value_heads=12
"""

import gc
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from benchmarks.compose import compose
from benchmarks.reports import provenance, write_report
from lora_lab.config import TrialConfig
from lora_lab.options import Checkpointing
from lora_lab.store.environment import device_facts, environment
from lora_lab.telemetry.flops import PASSES, attention_forward, products, repeated_products, repeated_share
from lora_lab.trial.devices import choose_placement
from lora_lab.worker.data import TokenCounts, train_collator
from lora_lab.worker.loading import load_examples
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.tokenizer_files import load_tokenizer
from lora_lab.worker.training import make_trainer
from lora_lab.worker.weight_counts import count_model

LIMIT = 0.02
SHAPES = ((2, 128), (1, 1024))
"""Rows and tokens a row: attention is a small part of the first and a large one of the second."""
OVERRIDES = [
    "method=lora",
    "optimizer=adamw",
    "model.weights=random",
    "data=random_tokens",
    "data.rows=8",
    "measure.warmup_steps=0",
    "measure.steps=1",
    "measure.eval_rows=0",
    "measure.profile_steps=0",
    "tracking=none",
]
PARTS = ("products", "attention", "recomputation", "total")


def one_step(config: TrialConfig, device: torch.device) -> tuple[dict[str, int], dict[str, Any]]:
    """torch's count of one step by operation; the formula's parts, recomputation included for the layers that do it."""
    architecture = load_architecture(config.model)
    tokenizer = load_tokenizer(config.model)
    examples = load_examples(config, tokenizer, architecture.get_text_config().vocab_size).train
    model = load_model(config, architecture, device)
    collator = train_collator(config, tokenizer.pad_token_id)
    batch = examples[: config.batch_size]
    counts = collator(batch)["counts"]
    assert isinstance(counts, TokenCounts)

    def without_counts(rows: Any) -> dict[str, Any]:
        return {name: tensor for name, tensor in collator(rows).items() if name != "counts"}

    collate: Any = without_counts
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, model, batch, collate, [TrainerCallback()], folder, device)
        with FlopCounterMode(display=False) as counter:
            trainer.train()
    seen = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    counted = count_model(model)
    fused = any("scaled_dot_product" in operation for operation in seen)
    forward = attention_forward(counted, counts.attended_slots)
    again = repeated_products(counted, counts.slots) + forward
    formula = {
        "products": products(counted, counts.slots),
        "attention": forward * PASSES[fused],
        "recomputation": again * repeated_share(config.gradient_checkpointing.value, counted.layers),
    }
    return seen, {"formula": formula, "counted": asdict(counted), "fused": fused, "operations": seen}


def compare(name: str, overrides: list[str], device: torch.device) -> list[dict[str, Any]]:
    """With each kind of checkpointing: every part by formula and by torch, and the share that they differ by."""
    rows: list[dict[str, Any]] = []
    plain: dict[str, int] = {}
    for checkpointing in (Checkpointing.none, Checkpointing.full, Checkpointing.selective):
        config = compose([*overrides, f"gradient_checkpointing={checkpointing.name}"])
        seen, made = one_step(config, device)
        gc.collect()
        plain = plain or seen
        attention = sum(count for operation, count in plain.items() if _of_attention(operation))
        measured = {
            "products": sum(plain.values()) - attention,
            "attention": attention,
            "recomputation": sum(seen.values()) - sum(plain.values()),
            "total": sum(seen.values()),
        }
        formula = made.pop("formula")
        formula["total"] = sum(formula.values())
        differs = {part: formula[part] / measured[part] - 1 if measured[part] else formula[part] for part in PARTS}
        cell = name if checkpointing is Checkpointing.none else f"{name}, checkpointing {checkpointing.name}"
        rows.append({"cell": cell, "formula": formula, "torch": measured, "differs": differs, **made})
    return rows


def _of_attention(operation: str) -> bool:
    """Weights are multiplied with by mm and addmm; scores and values by bmm, or inside a fused operation."""
    return "bmm" in operation or "scaled_dot_product" in operation


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| cell | part | formula, GFLOP | torch, GFLOP | formula / torch - 1 |", "|---|---|---|---|---|"]
    for row in rows:
        for part in PARTS:
            by_formula, by_torch = row["formula"][part] / 1e9, row["torch"][part] / 1e9
            if by_formula or by_torch:
                lines.append(
                    f"| {row['cell']} | {part} | {by_formula:,.3f} | {by_torch:,.3f} | {row['differs'][part]:+.2%} |"
                )
    return "\n".join(lines)


def main() -> int:
    out, asked = Path(sys.argv[1]), sys.argv[2:]
    placement = choose_placement("auto")
    device = torch.device("cuda" if placement.cards else "cpu")
    overrides = [*OVERRIDES, f"attention={'sdpa' if placement.cards else 'eager'}", *asked]
    rows = []
    for batch_size, seq_len in SHAPES:
        name = f"{' '.join(asked) or 'smollm2_135m'} {batch_size}x{seq_len}"
        rows += compare(name, [*overrides, f"batch_size={batch_size}", f"seq_len={seq_len}"], device)
    origin = provenance(
        environment() | device_facts(placement), " ".join(["python -m benchmarks.flop_check OUT", *asked])
    )
    worst = max(abs(row["differs"][part]) for row in rows for part in PARTS)
    verdict = f"Largest difference of any part: {worst:.2%}; allowed are {LIMIT:.0%}."
    title = "Operations of a step: the formula, and torch's FlopCounterMode"
    write_report(out, "flop_check", title, origin, f"{verdict}\n\n{table(rows)}", {"cells": rows})
    print(table(rows), verdict, sep="\n\n")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
