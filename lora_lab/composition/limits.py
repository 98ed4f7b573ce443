"""Which values a number of the config can have: others can't be meant, or are more than a computer counts to."""

import math
from dataclasses import dataclass

from lora_lab.config import DataSource, TrialConfig


@dataclass(frozen=True, slots=True)
class _Above:
    """From beyond 0 to `most`; from 0 itself with `zero`."""

    most: float
    zero: bool = False

    def fault(self, key: str, value: float) -> str | None:
        """What is wrong with this value; None when nothing is."""
        # `not x > 0` rather than `x <= 0`, so that nan is refused as well
        if not (value >= 0 if self.zero else value > 0):
            return f"{key}={value} {'must not be negative' if self.zero else 'must be greater than 0'}."
        if value == math.inf:
            return f"{key}=inf must be finite."
        return f"{key}={value} is beyond what can be meant; use {self.most:,} or less." if value > self.most else None


_FLOAT = 3.4e38  # float32's largest
_ANY_FLOAT = _Above(_FLOAT)
_STEPS = _Above(10**7)
_LONGEST_WAIT_MINUTES = 30_000  # poll(2) counts milliseconds in 32 bits, 35,791 minutes

_LIMITS = {
    "optimizer.weight_decay": _Above(_FLOAT, zero=True),
    "method.rank": _Above(2**16),
    "method.alpha": _ANY_FLOAT,
    "data.rows": _Above(10**9),
    "measure.warmup_steps": _Above(10**7, zero=True),
    "measure.steps": _STEPS,
    "measure.eval_rows": _Above(10**7, zero=True),
    "measure.loss_spike": _ANY_FLOAT,
    "measure.profile_steps": _Above(1000, zero=True),
    "measure.idle_seconds": _Above(3600, zero=True),
    "measure.board_power_watts": _ANY_FLOAT,
    "measure.price_per_kwh": _ANY_FLOAT,
    "measure.co2_grams_per_kwh": _ANY_FLOAT,
    "batch_size": _Above(10**6),
    "grad_accum_steps": _Above(10**6),
    "seq_len": _Above(2**24),
    "learning_rate": _ANY_FLOAT,
    "max_grad_norm": _Above(_FLOAT, zero=True),
    "seed": _Above(2**32 - 1, zero=True),  # numpy's
    "cooldown_celsius": _Above(1000),
    "vram_limit_gib": _Above(10**6),
    "timeout_minutes": _Above(_LONGEST_WAIT_MINUTES),
    "repeats": _Above(1000),
}
"""Every number but data.holdout, method.dropout and engine.lengths, whose limits are faults.py's."""

_MOST_TOKENS = 10**9
"""In a micro-batch or in rows that are made up: all of it is in memory at once."""


def number_faults(config: TrialConfig) -> list[str]:
    """What is wrong with the config's numbers, one sentence each."""
    found = []
    for key, limit in _LIMITS.items():
        value = _value(config, key)
        fault = None if value is None else limit.fault(key, value)
        if fault:
            found.append(fault)
    return found or _sums(config)


def _sums(config: TrialConfig) -> list[str]:
    """What is too much together, of numbers that are sound alone."""
    found = []
    if config.seed + config.repeats > 2**32:
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
    assert node is None or isinstance(node, (int, float))
    return node
