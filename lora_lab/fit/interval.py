"""State how far an estimate may be off, from what the same estimates were off where memory was measured."""

from dataclasses import dataclass

from lora_lab.config import TrialConfig
from lora_lab.fit.shapes import Shapes
from lora_lab.fit.weights import is_known
from lora_lab.options import Attention, Checkpointing, EngineKind

_MEASURED_LAYERS, _MEASURED_HIDDEN, _MEASURED_RANK = (28, 32), (1536, 4096), (8, 64)
_MEASURED_TOKENS = (512, 16384)
_MEASURED_FAMILIES = ("qwen2", "llama")


@dataclass(frozen=True, slots=True)
class Errors:
    """Shares by which the true value may be off."""

    below: float
    """Of `least`: how much less may be enough."""
    above: float
    """Of `reserved`: how much more may be needed."""
    libraries: float
    """Of what torch does not see."""
    reasons: tuple[str, ...]
    """Why it is wider than where memory was measured; empty within."""


_BASE = {EngineKind.eager: 0.05, EngineKind.liger: 0.04, EngineKind.compile: 0.09, EngineKind.graph: 0.09}


def errors_of(config: TrialConfig, shapes: Shapes) -> Errors:
    """Return the errors to expect of a trial's estimate, wider for each way in which it is unlike what was measured."""
    reasons = list(_unlike(config, shapes))
    wider = 0.04 * len(reasons)
    return Errors(0.03 + wider, _BASE[config.engine.kind] + wider, 0.15, tuple(reasons))


def _unlike(config: TrialConfig, shapes: Shapes):
    method = config.method
    if shapes.family not in _MEASURED_FAMILIES:
        yield f"no {shapes.family} model was measured"
