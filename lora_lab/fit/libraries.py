"""What the CUDA context and libraries take of a card, apart from torch's allocator."""

import statistics
from dataclasses import dataclass

from lora_lab.config import TrialConfig
from lora_lab.fit.optimizer import pages
from lora_lab.libraries_cache import library_key, load_libraries
from lora_lab.options import EngineKind

_GIB = 2**30
_BY_ENGINE = {EngineKind.eager: 0.75, EngineKind.liger: 0.75, EngineKind.compile: 0.76, EngineKind.graph: 0.84}
"""In GiB, as `vram/other_gib` was in every stored trial on H100 and H200 with driver 580. It depends on the card, the
driver and torch, not on the model."""
_PAGED = 0.1
"""In GiB, what bitsandbytes' managed memory takes besides the state itself."""
_UNKNOWN, _SEEN = 0.35, 0.05
"""Shares by which a default, and what was measured on the same machine, may be off."""


@dataclass(frozen=True, slots=True)
class Libraries:
    """What torch's allocator does not see, in bytes."""

    size: int
    error: float
    """The share by which it may be off."""
    device: str
    """Where it was measured; empty for the stated default."""


def libraries_of(config: TrialConfig) -> Libraries:
    """Return what a trial on this machine measured. Where none had this engine, the default is moved by as much as the
    defaults of the others are off; without any trial it is the default."""
    kind, is_paged = config.engine.kind, pages(config.optimizer)
    seen = load_libraries()
    if seen is None:
        return Libraries(int(_GIB * _default(kind, is_paged)), _UNKNOWN, "")
    found = seen.gib.get(library_key(kind, is_paged))
    if found is None:
        defaults = {library_key(each, paged): _default(each, paged) for each in EngineKind for paged in (False, True)}
        moved = statistics.mean(size - defaults.get(key, size) for key, size in seen.gib.items())
        found = max(0.0, _default(kind, is_paged) + moved)
    return Libraries(int(_GIB * found), _SEEN, seen.device)


def _default(kind: EngineKind, is_paged: bool) -> float:
    return _BY_ENGINE[kind] + (_PAGED if is_paged else 0.0)
