"""State how far an estimate may be off, from what the same estimates were off where memory was measured."""

from collections.abc import Iterator
from dataclasses import dataclass

from lora_lab.config import TrialConfig
from lora_lab.fit.shapes import Shapes
from lora_lab.fit.weights import is_known
from lora_lab.options import Attention, Batching, Checkpointing, DType, EngineKind

_WIDER = 0.05
"""For each way in which a trial is unlike those that were measured. A judgement: nothing was measured there."""
_BELOW = {EngineKind.eager: 0.03, EngineKind.liger: 0.04, EngineKind.compile: 0.08, EngineKind.graph: 0.06}
_ABOVE = {EngineKind.eager: 0.06, EngineKind.liger: 0.10, EngineKind.compile: 0.10, EngineKind.graph: 0.08}
"""Shares of what the allocator needs: the largest errors of benchmarks/results/fit_error.md, rounded up."""
_ABOVE_OFFLOADED = 0.04
"""More, where layers' inputs go to host memory: the copies' own stream makes the allocator keep more."""
_MEASURED = {
    "rank": (8, 64),
    "hidden size": (1536, 4096),
    "tokens in a micro-batch": (512, 21848),
}
_FAMILIES = ("qwen2", "llama")


@dataclass(frozen=True, slots=True)
class Errors:
    """Shares by which the true value may be off."""

    below: float
    """Of `least`: how much less may be enough."""
    above: float
    """Of `reserved`: how much more may be needed."""
    reasons: tuple[str, ...]
    """Why it is wider than where memory was measured; empty within."""


def errors_of(config: TrialConfig, shapes: Shapes) -> Errors:
    """Return the errors to expect of a trial's estimate, wider for each way in which it is unlike what was measured."""
    reasons = tuple(_unlike(config, shapes))
    kind, wider = config.engine.kind, _WIDER * len(reasons)
    above = _ABOVE[kind] + (_ABOVE_OFFLOADED if config.gradient_checkpointing is Checkpointing.offloaded else 0.0)
    return Errors(_BELOW[kind] + wider, above + wider, reasons)


def _unlike(config: TrialConfig, shapes: Shapes) -> Iterator[str]:
    method, kind, mode = config.method, config.engine.kind, config.gradient_checkpointing
    values = (method.rank, shapes.hidden, config.batch_size * config.seq_len)
    for (name, (least, most)), value in zip(_MEASURED.items(), values, strict=True):
        if not least <= value <= most:
            yield f"{name} {value:,}: measured from {least:,} to {most:,}"
    if shapes.family not in _FAMILIES:
        yield f"model family {shapes.family}: not measured"
    if not is_known(config.optimizer):
        yield f"optimizer {config.optimizer.optim or config.optimizer.target}: taken for AdamW in fp32"
    if method.use_dora:
        yield "DoRA: not measured"
    if method.dropout or method.target_modules != ["all-linear"]:
        yield "dropout or chosen target modules: not measured"
    if mode is Checkpointing.selective or (mode is Checkpointing.offloaded and kind is not EngineKind.graph):
        yield f"gradient_checkpointing={mode.name} with engine={kind.name}: not measured"
    if kind is EngineKind.eager and config.engine.chunked_loss:
        yield "the chunked loss with engine=eager: not measured"
    if config.precision.dtype is DType.fp32:
        yield "fp32: measured at one shape"
    if config.attention is not Attention.sdpa or config.data.batching is Batching.packed:
        yield "attention or packing other than the default: not measured"
