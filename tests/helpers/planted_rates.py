"""Rates of the fake card, in the cache as trials and `lora-lab forecast` keep what they measured."""

from importlib.metadata import version

from lora_lab.events import MatmulRate
from lora_lab.matmul_cache import RateKey, store_rate
from lora_lab.memory_cache import store_bytes

UUID = "00000000-0000-0000-0000-000000000000"
"""As torch says it: NVML has GPU- before it."""


def plant_rates(flops: float, bytes_per_second: float, torch: str = "") -> None:
    """Put both rates into the cache of this process, by default of the torch that is installed."""
    torch = torch or f"{version('torch').partition('+')[0]}+cu130"
    key = RateKey(device=UUID, cuda="13.0", torch=torch, dtype="bfloat16")
    store_rate(key, MatmulRate(t=0.0, dtype="bfloat16", size=64, flops_per_second=flops))
    store_bytes(RateKey(device=UUID, cuda="13.0", torch=torch, dtype="uint8"), bytes_per_second)
