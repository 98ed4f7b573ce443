"""Ask fitcheck-llm and accelerate for the trials of benchmarks.fit_memory that they know something of.

    pip install --no-deps fitcheck-llm==0.3.1
    python -m benchmarks.fit_others benchmarks/results

Writes fit_others.json. fitcheck-llm models plain training alone, so only engine=eager is asked, with the optimizers and
settings that it knows. accelerate knows neither adapters nor activations: it says what weights take in 4 bit, and what
full training takes in 16 bit. Both are compared with what torch took in training and what context and libraries take
on such a card: in the trials with segments of fixed size, torch's default, which fitcheck-llm was made for.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from benchmarks.fit_cases import cases
from benchmarks.fit_error import errors
from benchmarks.reports import markdown, stored
from lora_lab.config import TrialConfig
from lora_lab.files import write_json
from lora_lab.fit.estimate import GIB, estimate
from lora_lab.fit.shapes import Shapes, shapes_of
from lora_lab.options import Batching, Checkpointing, EngineKind, Quantization

_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw-8bit",
    "paged_adamw_8bit": "adamw-8bit",
}


def main() -> None:
    out = Path(sys.argv[1])
    fitcheck: Any = importlib.import_module("fitcheck")
    rows, listed = [], cases()
    for row in stored("fit_error")["trials"]:
        if row["held_out"] or row["segments"] != "fixed":
            continue
        config = compose(listed[row["case"]])
        if not _is_known(config):
            continue
        shapes = shapes_of(config.model)
        said = estimate(config, shapes, expandable=False)
        measured = said.reserved / (1 + row["reserved_error"] / 100) + said.libraries.size
        found = {
            "measured": measured,
            "fit": said.card,
            "fitcheck": _fitcheck(fitcheck, row["case"], config, shapes) * 2**20,
            "accelerate": _accelerate(config, shapes),
        }
        rows.append({"case": row["case"]} | {f"{name}_gib": round(size / GIB, 3) for name, size in found.items()})
    write_json(out / "fit_others.json", {"fitcheck": fitcheck.__version__, "rows": rows})
    print(table())


def _is_known(config: TrialConfig) -> bool:
    method = config.method
    return (
        config.engine.kind is EngineKind.eager
        and not config.engine.chunked_loss
        and config.optimizer.optim in _OPTIMIZERS
        and config.gradient_checkpointing in (Checkpointing.none, Checkpointing.full)
        and config.data.batching is not Batching.packed
        and not (method.use_dora or method.dropout or method.raise_to_fp32)
    )


def _fitcheck(fitcheck: Any, name: str, config: TrialConfig, shapes: Shapes) -> float:
    """Return fitcheck's MiB on the card."""
    model = fitcheck.ModelConfig(
        name=name.split()[0],
        num_params=shapes.parameters,
        hidden_size=shapes.hidden,
        num_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_kv_heads=shapes.kv_heads,
        intermediate_size=shapes.intermediate,
        vocab_size=shapes.vocabulary,
        head_dim=shapes.head_size,
        tie_word_embeddings=shapes.is_tied,
    )
    quantised = config.method.quantization is not Quantization.none
    targets = config.method.target_modules
    training = fitcheck.TrainingConfig(
        precision=config.precision.dtype.name,
        quantization="nf4" if quantised else "none",
        double_quant=quantised,
        optimizer=_OPTIMIZERS[str(config.optimizer.optim)],
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        lora_rank=config.method.rank,
        lora_targets=[linear.name for linear in shapes.linears] if targets == ["all-linear"] else targets,
        grad_checkpoint=config.gradient_checkpointing is Checkpointing.full,
        flash_attn=True,
    )
    return float(fitcheck.estimate(model, training, fitcheck.get_gpu("h200")).total_mib)


def _accelerate(config: TrialConfig, shapes: Shapes) -> float:
    """Return what `accelerate estimate-memory` says in bytes: of 4-bit weights their size, and otherwise of training in
    16 bit."""
    from accelerate.commands.estimate import estimate_training_usage  # it imports torch, and table() needs none

    whole = 4 * shapes.parameters
    if config.method.quantization is not Quantization.none:
        return whole / 8
    return float(max(estimate_training_usage(whole, "bfloat16").values()))


def table() -> str:
    """Return docs/fit.md's comparison, from the stored answers."""
    content = stored("fit_others")
    lines = []
    asked = {"fit": "`lora-lab fit`", "fitcheck": f"fitcheck-llm {content['fitcheck']}"}
    asked["accelerate"] = "accelerate estimate-memory"
    for key, name in asked.items():
        found = [100 * (row[f"{key}_gib"] / row["measured_gib"] - 1) for row in content["rows"]]
        lines.append([name, str(len(found)), *errors(found)])
    return markdown(["on the card, `eager`", "trials", "mean", "worst", "too low"], lines)


if __name__ == "__main__":
    main()
