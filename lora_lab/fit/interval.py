"""State how far an estimate may be off, from what the same estimates were off where memory was measured."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_lab.config import TrialConfig
from lora_lab.fit.optimizer import is_known
from lora_lab.fit.shapes import Shapes
from lora_lab.fit.weights import is_quantised, trains_all
from lora_lab.options import Attention, Batching, Checkpointing, DType, EngineKind, Init

_WIDER = 0.05
"""For each way in which a trial is unlike those that were measured. A judgement: nothing was measured there. For a size
outside its range it is reached at a factor of 2, so that the answer does not jump at the end of the range."""
_BELOW = {EngineKind.eager: 0.03, EngineKind.liger: 0.04, EngineKind.compile: 0.05, EngineKind.graph: 0.07}
_ABOVE = {EngineKind.eager: 0.04, EngineKind.liger: 0.04, EngineKind.compile: 0.06, EngineKind.graph: 0.06}
"""Shares of what the allocator needs: the largest errors of live tensors in benchmarks.fit_memory, rounded up."""
KEPT = 0.08
"""More, where the allocator need not return what it has cached: its replay was off by as much."""
_EXPERTS = 0.2
"""More, for a mixture in 4 bit: loading its experts took 18 and 22 % more on a card than is listed."""
_RANKS, _HIDDEN, _TOKENS = (8, 128), (576, 4096), (512, 32768)
"""The ranges that were measured."""
_FAMILIES = ("qwen2", "llama", "qwen3", "gemma3_text", "gemma2", "phi3", "mixtral", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class Errors:
    """Shares by which the true value may be off."""

    below: float
    """Of `least`: how much less may be enough."""
    above: float
    """Of `least`: how much more may be needed."""
    reasons: tuple[str, ...]
    """Why it is wider than where memory was measured; empty within."""


def errors_of(config: TrialConfig, shapes: Shapes) -> Errors:
    """Return the errors to expect of a trial's estimate, wider for each way in which it is unlike what was measured."""
    kind, reasons = config.engine.kind, list(_unlike(config, shapes))
    below = _BELOW[kind] + _WIDER * len(reasons)
    above = _ABOVE[kind] + _WIDER * len(reasons)
    if shapes.experts is not None and is_quantised(config.method):
        reasons.append("a mixture in 4 bit: its loading took up to 22 % more than is listed")
        above += _EXPERTS
    for name, value, (least, most), is_bounded in (
        ("rank", config.method.rank, _RANKS, True),
        ("hidden size", shapes.hidden, _HIDDEN, False),
        ("tokens in a micro-batch", config.batch_size * config.seq_len, _TOKENS, True),
    ):
        if least <= value <= most:
            continue
        reasons.append(f"{name} {value:,}: measured from {least:,} to {most:,}")
        ramp = _WIDER * min(1.0, math.log2(max(least / value, value / most)))
        # the nearer end cannot jump: the answer for the end of the range bounds it
        below += _WIDER if is_bounded and value > most else ramp
        above += _WIDER if is_bounded and value < least else ramp
    return Errors(below, above, tuple(reasons))


def larger_measured(config: TrialConfig) -> Iterator[TrialConfig]:
    """Yield the trial with each size that is below its measured range raised to the range's least. What is enough for
    these is enough for the trial."""
    if config.method.rank < _RANKS[0]:
        yield replace(config, method=replace(config.method, rank=_RANKS[0]))
    if config.batch_size * config.seq_len < _TOKENS[0]:
        yield replace(config, seq_len=-(-_TOKENS[0] // config.batch_size))


def smaller_measured(config: TrialConfig) -> Iterator[TrialConfig]:
    """Yield the trial with each size that is above its measured range lowered to the range's most. The trial needs at
    least what these need."""
    if config.method.rank > _RANKS[1]:
        yield replace(config, method=replace(config.method, rank=_RANKS[1]))
    if config.batch_size * config.seq_len > _TOKENS[1] >= config.batch_size:
        yield replace(config, seq_len=_TOKENS[1] // config.batch_size)


def _unlike(config: TrialConfig, shapes: Shapes) -> Iterator[str]:
    method, kind, mode = config.method, config.engine.kind, config.gradient_checkpointing
    if shapes.family not in _FAMILIES:
        yield f"model family {shapes.family}: not measured"
    if not is_known(config.optimizer):
        yield f"optimizer {config.optimizer.optim or config.optimizer.target}: taken for AdamW in fp32"
    if trains_all(method):
        yield "method=full: measured on a CPU, and at one shape on a card"
    if method.use_dora and kind not in (EngineKind.eager, EngineKind.liger):
        yield f"DoRA with engine={kind.name}: not measured"
    if method.freeze_a:
        yield (
            "method.freeze_a=true: measured on a CPU alone"
            if kind is EngineKind.eager
            else (f"method.freeze_a=true with engine={kind.name}: taken for LoRA, which keeps more")
        )
    if method.init not in (Init.kaiming, Init.gaussian):
        yield f"method.init={method.init.name}: what its start takes for a moment was not measured"
    if (method.dropout or method.target_modules != ["all-linear"]) and kind is not EngineKind.eager:
        yield f"dropout or chosen target modules with engine={kind.name}: not measured"
    if mode is Checkpointing.selective and kind is not EngineKind.eager:
        yield f"gradient_checkpointing=selective with engine={kind.name}: not measured"
    if config.engine.mlp_tile is not None:
        yield "an MLP in tiles: measured at two lengths"
    if config.precision.dtype is DType.fp32:
        yield "fp32: measured at one shape"
    if config.placement.kind.shares_trials:
        yield "a trial over several cards: what NCCL takes was not measured"
    if config.attention is not Attention.sdpa or config.data.batching is Batching.packed:
        yield "attention or packing other than the default: measured at few shapes"
