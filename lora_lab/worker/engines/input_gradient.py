"""Let the first decoder layer's input need a gradient, as every other layer's does. Else it is one more compilation.

transformers has a switch for that, which makes a leaf of the embeddings' output. Autograd keeps a leaf to the end of a
step: for long rows a tensor of the hidden size that nothing else needs.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from lora_lab.worker.trainables.trainable import base_of


class _NeedsGradient(torch.autograd.Function):
    """Hands a tensor on, as the result of a calculation with `anchor`, which needs a gradient and gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:  # noqa: ARG004
        return None, None


def require_input_gradient(model: Any) -> None:
    """Let what the input embeddings give need a gradient from now on."""
    embeddings = base_of(model).get_input_embeddings()
    anchor = torch.zeros((), device=embeddings.weight.device, requires_grad=True)

    def hook(module: Any, given: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        needed: Tensor = output if output.requires_grad else _NeedsGradient.apply(output, anchor)
        return needed if torch.is_grad_enabled() else output

    embeddings.register_forward_hook(hook)
    # torch.compile looks whether it has a gradient already, and torch warns of that
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
