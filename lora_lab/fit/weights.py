"""Calculate the weights that stay on the card for the whole training, and the sizes of adapters."""

from lora_lab.config import TrialConfig
from lora_lab.fit.shapes import Experts, Linear, Shapes, blocks_of
from lora_lab.method_config import MethodConfig
from lora_lab.options import DType, MethodKind, Quantization

BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit formats."""
SCALES_BLOCK = 256
"""Scales that share a scale, where they are quantised too; also 8-bit optimizer states that share one."""
BYTES = {DType.fp32: 4, DType.fp16: 2, DType.bf16: 2}


def trains_all(method: MethodConfig) -> bool:
    """Return whether every weight is trained."""
    return method.kind is MethodKind.full


def is_quantised(method: MethodConfig) -> bool:
    """Return whether frozen linear layers are in 4 bit."""
    return method.quantization is not Quantization.none


def other_bytes(config: TrialConfig) -> int:
    """Return the bytes of a weight of the model that is not in 4 bit."""
    method = config.method
    dtype = method.held_in if trains_all(method) else config.precision.dtype
    return 4 if method.raise_to_fp32 else BYTES[dtype]


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
    named = targets == ["all-linear"] or any(name.rsplit(".", 1)[-1] == linear.name for name in targets)
    return named and not trains_all(method)


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
            sides += [] if method.freeze_a else [(method.rank, linear.inputs)]
            sides.append((linear.outputs, method.rank))
    experts = shapes.experts
    if experts and adapts_router(method, experts):
        sides += [(method.rank, shapes.hidden), (experts.count, method.rank)]
    if experts and adapts_experts(method):
        for stack in experts.stacks:
            ranks = experts.count * experts.rank(stack, method.rank)
            sides += [(ranks, stack.inputs), (stack.outputs, ranks)]
    return sides
