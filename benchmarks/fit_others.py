"""Ask fitcheck-llm for the same trials that lora_lab.fit is compared with.

    pip install --no-deps fitcheck-llm==0.3.1
    python -m benchmarks.fit_others benchmarks/results

Writes fit_others.json. It models plain training alone, so only engine=eager is asked, without raised embeddings, and
optimizers that it knows. What it is compared with is the worker's process; where the driver did not list that, what
the allocator took and the context and libraries of other trials on such a card. accelerate's estimate-memory is not
asked: it knows neither adapters nor activations.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from benchmarks.fit_error import SETTINGS, config_of, errors
from benchmarks.reports import markdown, stored
from lora_lab.files import write_json
from lora_lab.fit.estimate import GIB, estimate
from lora_lab.fit.shapes import Shapes, shapes_of

_LIBRARIES_GIB = 0.75
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw-8bit",
    "paged_adamw_8bit": "adamw-8bit",
}


def main() -> None:
    out = Path(sys.argv[1])
    fitcheck: Any = importlib.import_module("fitcheck")
    rows = []
    for row in stored("fit_error")["rows"]:
        if row["engine"] != "eager" or row["raised"] or row["optim"] not in _OPTIMIZERS or not row["reserved_gib"]:
            continue
        config = config_of(**{key: row[key] for key in SETTINGS})
        shapes = shapes_of(config.model)
        measured = row["process_gib"] or row["reserved_gib"] + _LIBRARIES_GIB
        theirs = _theirs(fitcheck, row, shapes) / 1024
        ours = estimate(config, shapes).card / GIB
        named = {key: row[key] for key in SETTINGS}
        found = {"measured_gib": round(measured, 3), "fitcheck_gib": round(theirs, 3), "fit_gib": round(ours, 3)}
        rows.append({**named, **found})
    write_json(out / "fit_others.json", {"fitcheck": fitcheck.__version__, "rows": rows})
    print(table())


def _theirs(fitcheck: Any, row: dict[str, Any], shapes: Shapes) -> float:
    """Return fitcheck's MiB on the card."""
    model = fitcheck.ModelConfig(
        name=row["model"],
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
    training = fitcheck.TrainingConfig(
        precision=row["precision"],
        quantization="nf4" if row["quantised"] else "none",
        double_quant=row["quantised"],
        optimizer=_OPTIMIZERS[row["optim"]],
        batch_size=row["batch_size"],
        seq_len=row["seq_len"],
        lora_rank=row["rank"],
        lora_targets=[linear.name for linear in shapes.linears],
        grad_checkpoint=row["checkpointing"] != "none",
        flash_attn=True,
    )
    return float(fitcheck.estimate(model, training, fitcheck.get_gpu("h200")).total_mib)


def table() -> str:
    """Return docs/fit.md's comparison, from the stored answers."""
    content = stored("fit_others")
    lines = []
    for name, key in (("`lora-lab fit`", "fit_gib"), (f"fitcheck-llm {content['fitcheck']}", "fitcheck_gib")):
        found = [100 * (row[key] / row["measured_gib"] - 1) for row in content["rows"]]
        lines.append([name, str(len(found)), *errors(found)])
    return markdown(["on the card, `eager`", "shapes", "mean", "worst", "too low"], lines)


if __name__ == "__main__":
    main()
