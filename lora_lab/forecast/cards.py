"""Cards that are not here: their published figures, and how much of those the measured cards attained."""

from dataclasses import dataclass

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.forecast.roofline import Speeds
from lora_lab.options import DType

MATMUL_ATTAINED = 0.8
"""Of the published rate of products: what H100s and H200s attained in every stored trial, 75 to 81 %."""
MEMORY_ATTAINED = 0.9
"""Of the published memory rate. Assumed; the constants were fitted with it."""


@dataclass(frozen=True, slots=True)
class PublishedCard:
    """A card by its maker's figures."""

    name: str
    tflops: float
    """Dense products of 16-bit numbers, summed in fp32."""
    gigabytes_per_second: float
    watts: float
    """The board's limit."""

    def speeds(self, config: TrialConfig) -> Speeds:
        """Return what the card probably attains.

        Raises: InvalidInput for a precision whose rate is not in the table."""
        if config.precision.dtype is DType.fp32:
            raise InvalidInput("--card knows the rates of 16-bit products only. Use precision=bf16 or precision=fp16.")
        return Speeds(self.tflops * 1e12 * MATMUL_ATTAINED, self.gigabytes_per_second * 1e9 * MEMORY_ATTAINED)


# NVIDIA's data sheets of H100 (SXM), H200 (SXM), A100 (80 GB, SXM), L40S and L4, without sparsity; NVIDIA's white
# papers on GA102 (RTX 3090) and Ada (RTX 4090), the tensor rate with FP32 accumulate
CARDS = {
    "h100": PublishedCard("H100 SXM", 989, 3350, 700),
    "h200": PublishedCard("H200 SXM", 989, 4800, 700),
    "a100": PublishedCard("A100 80 GB SXM", 312, 2039, 400),
    "l40s": PublishedCard("L40S", 362, 864, 350),
    "l4": PublishedCard("L4", 121, 300, 72),
    "rtx4090": PublishedCard("RTX 4090", 165, 1008, 450),
    "rtx3090": PublishedCard("RTX 3090", 71, 936, 350),
}


def card_named(name: str) -> PublishedCard:
    """Return the card of this name.

    Raises: InvalidInput."""
    found = CARDS.get(name.lower().replace(" ", "").replace("_", "").replace("-", ""))
    if found is None:
        raise InvalidInput(
            f"--card {name} is not in the table. Known are {', '.join(CARDS)}. On another card, --probe."
        )
    return found
