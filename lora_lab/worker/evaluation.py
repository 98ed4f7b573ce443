"""Calculate the loss of every row of a text, outside the measured window."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lab.options import DType
from lora_lab.outcome import Unsupported
from lora_lab.worker.data import IGNORED, Collator, Example
from lora_lab.worker.engines.chunked_loss import chunked_row_losses, is_in_chunks
from lora_lab.worker.example import sha256_of
from lora_lab.worker.models import working_dtype
from lora_lab.worker.quantised import evaluation_mode
from lora_lab.worker.shards import shards_of
from lora_lab.worker.trainables.trainable import base_of


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


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss of rows: for each one the sum in nats over its trained tokens, and their number."""

    nats: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Return the nats per trained token, weighted by tokens, so that neither rows nor batches change it."""
        return sum(self.nats) / sum(self.tokens)


def row_losses(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    precision: DType,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Losses:
    """Return the loss of each of `examples`, in their order.

    Rows are padded to the longest of their batch, also when training packs them.
    """
    collator = Collator(pad_id=pad_id)
    nats: list[float] = []
    with evaluating(model, precision, device):
        for start in range(0, len(examples), batch_size):
            batch = collator(examples[start : start + batch_size])
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if isinstance(tensor, Tensor)}
            nats += losses_of_batch(model, inputs).double().tolist()
            progress(min(start + batch_size, len(examples)), len(examples))
    return Losses(nats, [example.trained for example in examples])


def digest_of(examples: Sequence[Example]) -> str:
    """Return the first 16 hexadecimal digits of a sha256 over the ids and labels of all rows."""
    return sha256_of(examples)[:16]


def losses_of_batch(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the loss of each row, summed over its trained tokens, of shape (rows,) in fp32; within `evaluating`.

    Args:
        inputs: the tensors of a batch, on the model's device.
    """
    causal = base_of(model)
    if is_in_chunks(causal):
        return chunked_row_losses(causal, **inputs)
    caught: list[Tensor] = []

    def catch(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        caught.append(torch.stack([_summed(row, wanted) for row, wanted in zip(logits, labels, strict=True)]))
        return caught[-1].sum()

    with _loss_function(causal, catch):
        loss: Tensor = model(**inputs).loss
    if caught:
        return caught[0]
    # the model's code calculates its loss by itself, as a mean over the batch
    if shards_of(model) is not None:  # workers with batches of other sizes would come to its layers more often
        raise Unsupported(
            f"placement=fsdp: {type(causal).__name__} calculates its loss by itself, so that rows have to be evaluated "
            "one by one, and workers with fewer of them would wait for ever. Use placement=ddp or placement=one."
        )
    if len(inputs["labels"]) == 1:
        return loss.view(1) * (inputs["labels"][:, 1:] != IGNORED).sum()
    rows = range(len(inputs["labels"]))
    return torch.cat(
        [losses_of_batch(model, {name: tensor[i : i + 1] for name, tensor in inputs.items()}) for i in rows]
    )


@contextmanager
def _loss_function(causal: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    """Let the model calculate its loss by `function`: transformers' models take it from this attribute."""
    own = causal.__dict__.get("_loss_function")
    causal.loss_function = function
    try:
        yield
    finally:
        del causal._loss_function
        if own is not None:
            causal.loss_function = own


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross entropy of one row in fp32. Liger replaces torch's own function, so it is written out."""
    predicted, wanted = logits[:-1].float(), labels[1:]
    target = wanted.clamp(min=0).unsqueeze(1)
    each = predicted.logsumexp(dim=1) - predicted.gather(1, target).squeeze(1)
    return torch.where(wanted != IGNORED, each, 0.0).sum()
