"""Keep the frozen input embeddings in host memory: a step reads a few thousand of their rows, over PCIe.

To torch they stay tensors of the card, so every engine uses them as before, also in a CUDA graph.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_lab.config import TIED
from lora_lab.outcome import Unsupported
from lora_lab.worker.host_memory import copy_to_host, is_in_host_memory
from lora_lab.worker.trainables.trainable import base_of

_TRAINED = (
    "engine.host_embeddings=true: the embeddings of this model are trained, and only frozen ones can be kept in host "
    "memory. Use engine.host_embeddings=false."
)


def move_embeddings(model: Any, asked: bool | str, copied: Callable[[Tensor], Tensor] = copy_to_host) -> None:
    """Replace the memory of the input embeddings' weights; the parameter stays the same.

    Args:
        model: with what is trained of it.
        asked: True or auto, which leaves embeddings alone that have to stay on the card.
        copied: copies a tensor to host memory.

    Raises: Unsupported where they are the head too or are trained, and when there is not enough host memory.
    """
    weight = _weight(model)
    head = base_of(model).get_output_embeddings()
    is_tied = head is not None and head.weight is weight
    reason = TIED if is_tied else _TRAINED if weight.requires_grad else ""
    if reason and asked is True:
        raise Unsupported(reason)
    if reason:
        return
    try:
        weight.data = copied(weight.data)
    except MemoryError as error:
        raise Unsupported(
            f"engine.host_embeddings={str(asked).lower()} needs {weight.nbytes / 2**30:.2f} GiB of host memory that "
            f"stays in place, and this machine did not give it ({error}). Use engine.host_embeddings=false."
        ) from error


def place_of_embeddings(model: Any) -> str:
    """Return where the input embeddings of a model on a card are: host or card."""
    return "host" if is_in_host_memory(_weight(model)) else "card"


def _weight(model: Any) -> Any:
    return base_of(model).get_input_embeddings().weight
