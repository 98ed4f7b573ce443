"""The experts of a mixture, which transformers keeps as parameters of three dimensions and not as linear layers.

bitsandbytes can hold such a parameter in 4 bit, and PEFT can adapt one; PEFT 0.21 can't adapt one that is in 4 bit.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_lab.method_config import MethodConfig
from lora_lab.options import Quantization


def expert_weights(model: Any) -> Iterator[tuple[str, nn.Module, str]]:
    """Find each stacked weight of experts: the name of its module, the module, and the name of the parameter."""
    for name, module in model.named_modules():
        if "expert" not in f"{name} {type(module).__name__}".lower():
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                yield name, module, own


def adapted_experts(model: Any, method: MethodConfig) -> list[str]:
    """Name the stacked weights that get an adapter: all of them where every linear layer gets one, since they are
    linear layers."""
    if method.target_modules != ["all-linear"] or method.quantization is not Quantization.none:
        return []
    return sorted({f"{name.rsplit('.', 1)[-1]}.{own}" for name, _, own in expert_weights(model)})


def quantise_experts(model: Any, method: MethodConfig) -> list[str]:
    """Put stacked weights into 4 bit. A layer dequantizes its own while it runs.

    Returns: what the user should know of it."""
    if method.quantization is Quantization.none:
        return []
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    found = list(expert_weights(model))
    for _, module, own in found:
        replace_parameter_4bit(
            module, own, compress_statistics=method.double_quantization, quant_type=method.quantization.value
        )
    if not found:
        return []
    return [
        f"{len(found)} stacked weights of experts are in 4 bit and get no adapter, which PEFT can't put there. They "
        "are loaded in 16 bit first. Without gradient_checkpointing=full each layer's stay unpacked until its backward"
    ]
