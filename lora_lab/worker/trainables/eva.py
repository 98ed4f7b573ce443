"""Start each A as the first singular vectors of the layer's inputs over training rows, by PEFT (arXiv 2410.07170)."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import initialize_lora_eva_weights
from torch import Tensor

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.worker.data import Collator, Example
from lora_lab.worker.quantised import evaluation_mode
from lora_lab.worker.trainables.start import note_start

_TOKENS = 4
"""A batch's tokens over the rank, at least: PEFT needs as many as the rank, and settles sooner with more."""
_MOST = 400
"""Batches after which the vectors should have settled; PEFT itself would go on for ever."""


def start_from_rows(model: Any, config: TrialConfig, rows: Sequence[Example], padding: int) -> None:
    """Run training rows through the model, in an order by the seed, until the vectors no longer turn.

    Raises: InvalidInput for rows that are too few, or that never settle."""
    batches = _batches(config, rows, padding)
    left = _MOST

    def forward(model: Any, batch: dict[str, Tensor]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InvalidInput(
                f"method.init=eva: the inputs' first {config.method.rank} directions have not settled after {_MOST} "
                "batches. Use a smaller method.rank, or method.init=kaiming."
            )
        evaluation_mode(model)  # PEFT puts 4-bit layers into evaluation too
        model(**batch)

    initialize_lora_eva_weights(model, batches, forward_fn=forward, show_progress_bar=False)
    note_start(model, takes=False)


def _batches(config: TrialConfig, rows: Sequence[Example], padding: int) -> list[dict[str, Tensor]]:
    """Return batches of whole rows, each with enough tokens."""
    needed = _TOKENS * config.method.rank
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    collator, made, waiting, tokens = Collator(pad_id=padding), [], [], 0
    for place in order:
        waiting.append(rows[place])
        tokens += len(rows[place].ids)
        if tokens >= needed:
            batch = collator(waiting)
            made.append({name: batch[name] for name in ("input_ids", "attention_mask")})
            waiting, tokens = [], 0
        if len(made) == _MOST:
            break
    if not made:
        raise InvalidInput(
            f"method.init=eva with method.rank={config.method.rank} needs {needed} tokens, and the training rows have "
            f"{tokens}. Use more rows, a smaller method.rank, or method.init=kaiming."
        )
    return made  # type: ignore[return-value]
