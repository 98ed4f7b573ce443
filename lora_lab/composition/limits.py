"""Check the numbers of a config against the limits of their settings, alone and together."""

from lora_lab.config import TrialConfig
from lora_lab.options import DataSource
from lora_lab.settings import settings_of

_MOST_TOKENS = 10**9
"""In a micro-batch or in rows that are made up: all of it is in memory at once."""


def number_faults(config: TrialConfig) -> list[str]:
    """Return what is wrong with the config's numbers, one sentence each."""
    found = []
    for each in settings_of(TrialConfig):
        value = _value(config, each.key) if each.limits is not None else None
        fault = each.limits.fault(each.key, value) if each.limits is not None and value is not None else ""
        if fault:
            found.append(fault)
    return found or _sums(config)


def _sums(config: TrialConfig) -> list[str]:
    """Return what is too much together, of numbers that are valid alone."""
    found = []
    repeats = config.repeats if isinstance(config.repeats, int) else 1000  # auto needs no more in practice
    if config.seed + repeats > 2**32:
        found.append(
            f"seed={config.seed} with repeats={config.repeats}: repeat r has seed + r, and numpy takes none above "
            f"{2**32 - 1}. Use a smaller seed."
        )
    held = {"batch_size": config.batch_size}
    if config.data.source is DataSource.random_tokens:
        held["data.rows"] = config.data.rows or 0
    for key, rows in held.items():
        if rows * config.seq_len > _MOST_TOKENS:
            found.append(
                f"{key}={rows} with seq_len={config.seq_len} is {rows * config.seq_len:,} tokens in memory at once; "
                f"at most {_MOST_TOKENS:,} can be. Use a smaller {key} or seq_len."
            )
    return found


def _value(config: TrialConfig, key: str) -> float | None:
    node: object = config
    for name in key.split("."):
        node = getattr(node, name)
    return node if isinstance(node, (int, float)) else None  # `repeats` may be a word, which validation checks
