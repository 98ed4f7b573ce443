"""Find the weights of a live model that are held in 4 bit, and protect them in evaluation."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def is_quantised(module: Any) -> bool:
    """Return True for a layer of bitsandbytes, or of a class made from one."""
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__)


def quantised_share(model: Any, trained: Iterable[Any] = ()) -> float:
    """Calculate the share of the frozen weights in matrices that is held in 4 bit. Embeddings and the head are left
    out: they stay in 16 bit by design. So do norms and biases, which are no matrices. 1.0 where there is no matrix.

    Args:
        trained: parameters that a method has added.
    """
    kept = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    head = model.get_output_embeddings()
    apart = {id(module.weight) for module in [*kept, *([] if head is None else [head])]} | {id(p) for p in trained}
    stacked = {id(parts.original): parts[0].quant_state for parts in _parametrised(model)}
    packed = whole = 0
    for _, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None) or stacked.get(id(parameter))
        count = math.prod(state.shape) if state is not None else parameter.numel()
        shape = state.shape if state is not None else parameter.shape
        if id(parameter) in apart or len(shape) < 2:
            continue
        whole += count
        packed += count if state is not None else 0
    return packed / whole if whole else 1.0


def _parametrised(model: Any) -> Iterator[Any]:
    """Yield the parametrizations that bitsandbytes' replace_parameter_4bit has made."""
    for module in model.modules():
        for parts in getattr(module, "parametrizations", {}).values():
            if hasattr(parts[0], "quant_state"):
                yield parts


def evaluation_mode(model: Any) -> None:
    """Call model.eval(), but leave bitsandbytes' 4-bit layers in training mode. On a CPU with AVX512-BF16 they repack
    their weights for inference in evaluation, for good. Training after that runs through an operation without a
    gradient, and wrongly. They use the mode for nothing else."""
    model.eval()
    for module in model.modules():
        if is_quantised(module):
            module.train(True)
