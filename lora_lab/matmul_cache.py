"""Cache a device's measured matrix-product rate between trials, because measuring it takes a second."""

import contextlib
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_lab.events import MatmulRate
from lora_lab.files import read_json, write_json
from lora_lab.paths import cache_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class RateKey:
    """What a rate depends on; if any of it changes, the rate is measured again."""

    device: str
    """A card's UUID; or a CPU's name and the number of CPUs."""
    cuda: str
    """The CUDA version that torch was built for; empty for a CPU."""
    torch: str
    dtype: str
    """The precision that was asked for; a rate has the dtype of a stand-in."""

    def is_of(self, card: str, torch: str) -> bool:
        """Return whether it is of this card, by NVML's UUID, and this installed version of torch. torch's own UUID has
        no GPU- before it, and its own version may say which CUDA it was built for."""
        return self.device.removeprefix("GPU-") == card.removeprefix("GPU-") and _public(self.torch) == _public(torch)


def load_rate(key: RateKey) -> MatmulRate | None:
    """Return the rate stored for `key`, with `t` set to now; None when there is none, or its file is damaged."""
    stored = read_json(_file(key))
    try:
        if stored["key"] != asdict(key):
            return None
        dtype, size, rate = stored["dtype"], stored["size"], stored["flops_per_second"]
    except (KeyError, TypeError):
        return None
    if not (isinstance(dtype, str) and isinstance(size, int) and isinstance(rate, float)):
        return None
    if not (math.isfinite(rate) and rate > 0):
        return None
    return MatmulRate(t=time.monotonic(), dtype=dtype, size=size, flops_per_second=rate)


def known_rate(card: str, torch: str, dtype: str) -> float | None:
    """Return the operations per second stored for a card; None when there are none. CUDA's version is not asked for,
    because a process without torch does not know it, and one version of torch is built for one of CUDA."""
    for file in cache_folder().glob("matmul-rate-*.json"):
        stored = read_json(file)
        with contextlib.suppress(AttributeError, KeyError, TypeError):  # a damaged file
            key = RateKey(**stored["key"])
            if key.is_of(card, torch) and key.dtype == dtype and (rate := load_rate(key)) is not None:
                return rate.flops_per_second
    return None


def store_rate(key: RateKey, rate: MatmulRate) -> None:
    """Store `rate` for `key` atomically. Write errors are ignored."""
    file = _file(key)
    content = asdict(rate) | {"key": asdict(key)}
    del content["t"]  # a clock that restarts with the machine
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)


def _public(version: str) -> str:
    return version.partition("+")[0]


def _file(key: RateKey) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"matmul-rate-{digest[:16]}.json"
