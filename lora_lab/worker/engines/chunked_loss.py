"""Cross entropy over a few rows of logits at a time, so that the logits never exist whole.

For a large vocabulary the logits are the largest tensor of a step: 4,096 tokens of Qwen2.5's 151,936 words take 2.5 GB
in fp32, several times over. Here a chunk's logits live only until its loss and its gradient are known, in the forward,
so that the backward needs no second product. torch 2.13 has the like (torch.nn.functional.linear_cross_entropy); 2.11
has not, and torch.compile stops there. Liger's asks for a number on the host, which a CUDA graph can't record.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from lora_lab.outcome import Unsupported
from lora_lab.worker.data import IGNORED
from lora_lab.worker.evaluation import evaluation_mode

CHUNK_ELEMENTS = 2**26
"""Logits that may exist at a time: 0.125 GiB in a 16-bit format, and their gradient as much again."""

_HEADROOM = 1024.0
"""In fp16, gradients of single logits lie below what it holds; they are this much larger until the backward."""

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far the loss may be from the model's own, in nats a token, by the format that it calculates in."""

Chunk = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, headroom: float) -> tuple[Tensor, Tensor]:
    """A chunk's summed loss and its gradient.

    Args:
        hidden: (rows, hidden size).
        weight: the head's, (vocabulary, hidden size), in the same format.
        labels: (rows,), IGNORED where nothing is predicted.
        headroom: what the gradient is multiplied with.

    Returns: the loss in fp32, a scalar; its gradient over `hidden`, in that format, times `headroom`.
    """
    logits = torch.mm(hidden, weight.t()).float()
    trained = (labels != IGNORED).unsqueeze(1)
    target = labels.clamp(min=0).unsqueeze(1)
    spread = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = ((spread - logits.gather(1, target)) * trained).sum()
    words = torch.arange(weight.shape[0], device=labels.device)
    slope = torch.where(trained, (logits - spread).exp() - (words == target).float(), 0.0)
    return loss, torch.mm((slope * headroom).to(hidden.dtype), weight)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: Chunk) -> Tensor:
        ctx.headroom = _HEADROOM if hidden.dtype is torch.float16 else 1.0
        size = chunk_rows(hidden.shape[0], weight.shape[0])
        total = torch.zeros((), device=hidden.device)
        slope = torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            loss, slope[rows] = chunk(hidden[rows], weight, labels[rows], ctx.headroom)
            total += loss
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * (grads[0] / ctx.headroom)).to(slope.dtype), None, None, None


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows of a chunk: as few chunks as CHUNK_ELEMENTS allows, all of one size but perhaps the last."""
    most = max(1, CHUNK_ELEMENTS // vocabulary)
    chunks = -(-rows // most)
    return -(-rows // chunks)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: Chunk = chunk_loss) -> Tensor:
    """Summed loss in nats over the labels that are not IGNORED, in fp32; for frozen `weight` only.

    Args:
        hidden: (rows, hidden size).
        weight: the head's, (vocabulary, hidden size).
        labels: (rows,), already shifted.
        chunk: `chunk_loss`, or that compiled.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # what a linear layer would calculate in
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(kind, enabled=False):
        total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)
        return total


def use_chunked_loss(model: Any, chunk: Chunk = chunk_loss) -> None:
    """Let the causal language model under a PeftModel calculate its loss in chunks whenever it is given labels; its
    output then has no logits. The model's class is not touched.

    Raises: Unsupported when its head is not one frozen matrix, or its loss is another than that of such a head
    (softcapped or scaled logits, say): a few tokens tell.
    """
    causal = model.get_base_model()
    whole, decoder, head = causal.forward, causal.get_decoder(), causal.get_output_embeddings()
    plain = isinstance(head, torch.nn.Linear) and head.bias is None and head.weight.is_floating_point()
    if not plain or head.weight.requires_grad:
        raise Unsupported(
            f"engine.chunked_loss needs a head that is one frozen matrix; that of {type(causal).__name__} is not. "
            "Use engine.chunked_loss=false."
        )

    def forward(labels: Tensor | None = None, num_items_in_batch: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return whole(**inputs)
        inputs.pop("return_dict", None)
        hidden = decoder(**inputs).last_hidden_state
        shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
        total = chunked_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head.weight, shifted, chunk)
        count = (shifted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)

    _refuse_another_loss(causal, whole, forward)
    causal.forward = forward


def _refuse_another_loss(causal: Any, whole: Any, chunked: Any) -> None:
    ids = torch.arange(3, 19, device=causal.device).unsqueeze(0)
    was_training = causal.training
    evaluation_mode(causal)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        own, ours = float(whole(input_ids=ids, labels=ids).loss), float(chunked(input_ids=ids, labels=ids).loss)
    causal.train(was_training)
    if abs(own - ours) > _TOLERANCE.get(causal.dtype, 5e-2):
        raise Unsupported(
            f"engine.chunked_loss gives {ours:.4f} nats a token where {type(causal).__name__} itself gives {own:.4f}: "
            "it does more with its logits. Use engine.chunked_loss=false."
        )
