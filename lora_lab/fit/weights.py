"""Calculate what stays on the card for the whole training: frozen weights, adapters and optimizer state."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.config import MethodConfig, OptimizerConfig, TrialConfig
from lora_lab.fit.shapes import Experts, Linear, Shapes, blocks_of
from lora_lab.options import DType, Quantization

BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit formats."""
SCALES_BLOCK = 256
"""Scales that share a scale, where they are quantised too; also 8-bit optimizer states that share one."""
_SMALL_STATE = 4096
"""bitsandbytes keeps the state of a parameter with fewer elements in fp32."""
_PAGED_FROM = 100_000
"""bitsandbytes pages the state of a parameter with at least as many elements."""
BYTES = {DType.fp32: 4, DType.fp16: 2, DType.bf16: 2}


@dataclass(frozen=True, slots=True)
class State:
    """An optimizer's state in bytes."""

    total: int
    paged: int
    """The part in managed memory, which torch's allocator does not see."""
    working: int
    """What a step takes besides."""


def is_quantised(method: MethodConfig) -> bool:
    """Return whether frozen linear layers are in 4 bit."""
    return method.quantization is not Quantization.none


def other_bytes(config: TrialConfig) -> int:
    """Return the bytes of a frozen weight that is not in 4 bit."""
    return 4 if config.method.raise_to_fp32 else BYTES[config.precision.dtype]


def linear_bytes(linear: Linear, config: TrialConfig) -> list[int]:
    """Return the bytes of a linear layer's weights, and of their scales where they are in 4 bit."""
    return weight_bytes(linear.weights, config)


def weight_bytes(weights: int, config: TrialConfig) -> list[int]:
    """Return the bytes of as many weights, and of their scales where they are in 4 bit."""
    if not is_quantised(config.method):
        return [weights * other_bytes(config)]
    scales = blocks_of(weights, BLOCK)
    if not config.method.double_quantization:
        return [weights // 2, 4 * scales]
    return [weights // 2, scales, 4 * blocks_of(scales, SCALES_BLOCK)]


def adapted(method: MethodConfig, linear: Linear) -> bool:
    """Return whether a linear layer gets an adapter."""
    targets = method.target_modules
    return targets == ["all-linear"] or any(name.rsplit(".", 1)[-1] == linear.name for name in targets)


def adapts_experts(method: MethodConfig) -> bool:
    """Return whether stacked weights of experts get an adapter, as worker/experts.py decides."""
    return method.target_modules == ["all-linear"] and not is_quantised(method)


def adapts_router(method: MethodConfig, experts: Experts) -> bool:
    """Return whether a mixture's router gets an adapter: where PEFT takes it for the linear layer that it was."""
    return method.target_modules == ["all-linear"] and experts.is_read_as_before


def adapter_sizes(method: MethodConfig, shapes: Shapes) -> list[int]:
    """Return the elements of each trained parameter of one decoder layer."""
    sizes = [rows * columns for rows, columns in adapter_sides(method, shapes)]
    if method.use_dora:
        sizes += [linear.outputs for linear in shapes.linears if adapted(method, linear)]
    return sizes


def adapter_sides(method: MethodConfig, shapes: Shapes) -> list[tuple[int, int]]:
    """Return rows and columns of each trained matrix of one decoder layer."""
    sides = []
    for linear in shapes.linears:
        if adapted(method, linear):
            sides += [(method.rank, linear.inputs), (linear.outputs, method.rank)]
    experts = shapes.experts
    if experts and adapts_router(method, experts):
        sides += [(method.rank, shapes.hidden), (experts.count, method.rank)]
    if experts and adapts_experts(method):
        for stack in experts.stacks:
            ranks = experts.count * experts.rank(stack, method.rank)
            sides += [(ranks, stack.inputs), (stack.outputs, ranks)]
    return sides


def optimizer_state(optimizer: OptimizerConfig, sizes: Sequence[int], sides: Sequence[tuple[int, int]]) -> State:
    """Calculate an optimizer's state for parameters of these sizes, by the optimizer's own rule.

    Args:
        sizes: elements of each parameter.
        sides: rows and columns of each matrix, for states that are factored.
    """
    name, elements = optimizer.optim or optimizer.target or "", sum(sizes)
    if name in ("adamw_torch", "adamw_torch_fused", "adamw_hf"):
        # without the fused kernel the root of the second moment exists for all parameters at once
        return State(8 * elements, 0, 0 if name.endswith("fused") else 4 * elements)
    if name in _STATES:
        moments, bits = _STATES[name]
        is_paged = pages(optimizer)
        total = paged = 0
        for size in sizes:
            small = bits == 32 or size < _SMALL_STATE
            held = moments * size * (4 if small else 1)
            paged += held if is_paged and size >= _PAGED_FROM else 0
            total += held + (0 if small else moments * 4 * blocks_of(size, SCALES_BLOCK))
        return State(total, paged, 0)
    if name == "adafactor":
        factored = sum(4 * (rows + columns) for rows, columns in sides)
        return State(factored, 0, 8 * max(sizes, default=0))
    if name.endswith(".SGD") or name == "sgd":
        return State(4 * elements if optimizer.args.get("momentum") else 0, 0, 0)
    return State(8 * elements, 0, 4 * elements)


def pages(optimizer: OptimizerConfig) -> bool:
    """Return whether bitsandbytes keeps the optimizer's state in managed memory."""
    return (optimizer.optim or "").startswith("paged_")


def is_known(optimizer: OptimizerConfig) -> bool:
    """Return whether the optimizer's rule is known here; otherwise it is taken for AdamW."""
    name = optimizer.optim or optimizer.target or ""
    known = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adafactor", "sgd", *_STATES)
    return name in known or name.endswith(".SGD")


_STATES = {
    "adamw_bnb_8bit": (2, 8),
    "adamw_8bit": (2, 8),
    "paged_adamw_8bit": (2, 8),
    "paged_adamw_32bit": (2, 32),
    "lion_8bit": (1, 8),
    "lion_32bit": (1, 32),
    "paged_lion_8bit": (1, 8),
    "paged_lion_32bit": (1, 32),
}
"""bitsandbytes' optimizers: moments of each element, and bits of each moment."""
