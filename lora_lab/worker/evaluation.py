"""Calculate the held-out loss, outside the measured window."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lora_lab.options import DType
from lora_lab.worker.data import Collator, Example, TokenCounts
from lora_lab.worker.models import working_dtype
from lora_lab.worker.quantised import evaluation_mode


@contextmanager
def evaluating(model: Any, precision: DType, device: torch.device) -> Iterator[None]:
    """Evaluate within: no gradients, no dropout, the products in the format of training. Afterwards the model trains
    again if it did before."""
    dtype = working_dtype(precision, device)
    was_training = model.training
    evaluation_mode(model)
    # rows have any length: what an engine has compiled for its own lengths is not used
    with (
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
        torch.autocast(device.type, dtype, enabled=dtype is not torch.float32),
    ):
        yield
    model.train(was_training)


def heldout_loss(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    precision: DType,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[float, int]:
    """Return the mean loss in nats over every trained token of `examples`, and the number of those tokens.

    The mean is weighted by tokens, so that the batch size does not change it (Trainer's own evaluation averages batch
    means). Rows are padded to the longest, also when training packs them.
    """
    collator = Collator(pad_id=pad_id)
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    with evaluating(model, precision, device):
        for start in range(0, len(examples), batch_size):
            batch = collator(examples[start : start + batch_size])
            counts = batch.pop("counts")
            assert isinstance(counts, TokenCounts)
            output = model(
                **{name: tensor.to(device) for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}
            )
            total += output.loss.double().cpu() * counts.trained
            tokens += counts.trained
            progress(min(start + batch_size, len(examples)), len(examples))
    return float(total / tokens), tokens
