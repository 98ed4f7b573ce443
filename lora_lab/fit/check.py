"""Refuse settings that the trial refuses for the model's shapes, and those whose memory is not calculated here."""

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.fit.shapes import Shapes

_TABLES = ("lm_head", "embed_tokens")


def check(config: TrialConfig, shapes: Shapes) -> None:
    """Raise InvalidInput for rows longer than the model's positions, and for modules that get no adapter here."""
    if shapes.longest is not None and config.seq_len > shapes.longest:
        raise InvalidInput(
            f"seq_len={config.seq_len} is beyond the model's {shapes.longest} positions; use {shapes.longest} or less."
        )
    targets = config.method.target_modules
    if targets == ["all-linear"]:
        return
    there = sorted(linear.name for linear in shapes.linears)
    last = {name: name.rpartition(".")[2] for name in targets}
    tables = [name for name in targets if last[name] in _TABLES]
    if tables:
        raise InvalidInput(
            f"method.target_modules names {', '.join(tables)}: the memory of adapters on embeddings and on the head is "
            f"not calculated here. Leave them out, or run a short trial instead: measure=quick."
        )
    missing = [name for name in targets if last[name] not in there]
    if missing:
        raise InvalidInput(
            f"method.target_modules names {', '.join(missing)}, which the model's layers do not have; they have "
            f"{', '.join(there)}."
        )
