"""What the CUDA context and libraries take of a card, apart from torch's allocator."""

from lora_lab.config import TrialConfig
from lora_lab.fit.weights import pages
from lora_lab.options import EngineKind

_MIB = 2**20
_BY_ENGINE = {EngineKind.eager: 768, EngineKind.liger: 768, EngineKind.compile: 780, EngineKind.graph: 860}
"""In MiB, as `vram/other_gib` was in every stored trial on H100 and H200 with driver 580. It depends on the card, the
driver and torch, not on the model."""
_PAGED = 105
"""In MiB, what bitsandbytes' managed memory takes besides the state itself."""


def libraries_bytes(config: TrialConfig) -> int:
    """Return the stated default for the CUDA context, libraries' kernels and what the driver rounds."""
    return _MIB * (_BY_ENGINE[config.engine.kind] + (_PAGED if pages(config.optimizer) else 0))
