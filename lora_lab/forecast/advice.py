"""Say what to do about a long training, with the override to type."""

from lora_lab.config import TrialConfig
from lora_lab.forecast.estimate import Forecast
from lora_lab.options import Batching, Checkpointing, EngineKind

RENT_HOURS = 6.0
REDUCE_HOURS = 12.0
"""Hours of an epoch from which to rent a larger card, and from which to reduce the work."""

_PADDED = 0.3
"""The share of padding from which packing is worth a word."""


def advice(config: TrialConfig, found: Forecast, on_card: bool) -> list[str]:
    """Return sentences; none where an epoch is short."""
    hours = found.epoch_seconds / 3600
    if hours < RENT_HOURS:
        return []
    said = [f"An epoch takes {hours:.1f} h, which is over {RENT_HOURS:g} h: rent a larger card."]
    if hours >= REDUCE_HOURS:
        said[0] = (
            f"An epoch takes {hours:.1f} h, which is over {REDUCE_HOURS:g} h: reduce the work, or rent a larger card."
        )
        said += _reductions(config, found, hours)
    return said + _faster(config, found, on_card)


def _reductions(config: TrialConfig, found: Forecast, hours: float) -> list[str]:
    rows = found.work.data.rows_read
    fewer = max(1, round(rows * REDUCE_HOURS / hours))
    said = [f"Fewer rows: data.rows={fewer} of {rows:,} takes about {REDUCE_HOURS:g} h an epoch."]
    if config.train.epochs is not None and config.train.epochs > 1:
        said.append(f"Fewer epochs: train.epochs=1 instead of {config.train.epochs:g}.")
    longest, most = found.work.data.length_p95, config.seq_len
    if longest is not None and longest < most * 0.75:
        said.append(f"Shorter rows: seq_len={longest} still holds 95 % of the rows whole.")
    return said


def _faster(config: TrialConfig, found: Forecast, on_card: bool) -> list[str]:
    said = []
    if on_card and config.engine.kind is not EngineKind.graph and not config.method.use_dora:
        said.append("A faster engine: engine=graph.")
    if config.gradient_checkpointing is not Checkpointing.none:
        said.append("Where the memory suffices: gradient_checkpointing=none calculates nothing twice.")
    slots = sum(batch.slots for batch in found.work.epoch)
    real = sum(batch.real for batch in found.work.epoch)
    if 1 - real / slots > _PADDED and config.data.batching is not Batching.packed:
        said.append(f"Less padding ({1 - real / slots:.0%} of the slots): data.batching=packed.")
    return said
