"""Cache a device's measured copying rate between forecasts, next to its matrix-product rate."""

import contextlib
import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

from lora_lab.files import read_json, write_json
from lora_lab.matmul_cache import RateKey
from lora_lab.paths import cache_folder


def load_bytes(key: RateKey) -> float | None:
    """Return the bytes per second stored for `key`; None when there are none, or their file is damaged."""
    stored = read_json(_file(key))
    if not isinstance(stored, dict) or stored.get("key") != asdict(key):
        return None
    rate = stored.get("bytes_per_second")
    return rate if isinstance(rate, float) and math.isfinite(rate) and rate > 0 else None


def known_bytes(card: str, torch: str) -> float | None:
    """Return the bytes per second stored for a card; None when there are none. See `known_rate`."""
    for file in cache_folder().glob("memory-rate-*.json"):
        stored = read_json(file)
        with contextlib.suppress(AttributeError, KeyError, TypeError):  # a damaged file
            key = RateKey(**stored["key"])
            if key.is_of(card, torch) and (rate := load_bytes(key)) is not None:
                return rate
    return None


def store_bytes(key: RateKey, rate: float) -> None:
    """Store the bytes per second for `key` atomically. Write errors are ignored."""
    file = _file(key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": asdict(key), "bytes_per_second": rate})


def _file(key: RateKey) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"memory-rate-{digest[:16]}.json"
