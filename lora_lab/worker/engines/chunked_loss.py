"""Calculate cross entropy over a few rows of logits at a time, so that the logits never exist whole.

For a large vocabulary the logits are the largest tensor of a step: 4,096 tokens of Qwen2.5's 151,936 words take 2.5 GB
in fp32, several times over. Here a chunk's logits live only until its loss and its gradient are known, in the forward,
so that the backward needs no second product. torch 2.13 has torch.nn.functional.linear_cross_entropy for this; 2.11
does not, and torch.compile breaks the graph there. Liger's reads a number on the host, which a CUDA graph can't record.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from lora_lab.outcome import Unsupported
from lora_lab.worker.data import IGNORED
from lora_lab.worker.engines.tied_gradient import Aside, tie
from lora_lab.worker.quantised import evaluation_mode
from lora_lab.worker.shards import gathered
from lora_lab.worker.trainables.trainable import base_of, has_adapters

CHUNK_ELEMENTS = 2**26
"""Logits that may always exist at a time: 0.125 GiB in a 16-bit format, and their gradient as much again."""

_WIDER = 8
"""Compiled, this many times the elements of the hidden state, about what the tensors of one layer's MLP take anyway,
or of a tile of it: for many rows, larger products come closer to the card's peak. In eager mode a logit takes eight
times the memory."""

_PARTS = 4
"""But no more than all logits divided by this."""

_ALIGNED = 64

_SUMMED_IN_BF16 = 64
"""As many chunks add up a trained head's gradient in bf16, where its weights are in bf16. Each product is added with an
fp32 sum inside and rounded once. From about 250 on what a chunk adds would be less than the sum's last digit."""

_PIECE = 2**24
"""Elements of a gradient that are scaled together, in fp32."""

_HEADROOM = 1024.0
"""In fp16 the gradients of single logits underflow; they are scaled by this until the backward."""

Chunk = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, ...]]


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, headroom: float) -> tuple[Tensor, ...]:
    """Calculate a chunk's summed loss and its gradient, for a frozen head.

    Args:
        hidden: (rows, hidden size).
        weight: the head's, (vocabulary, hidden size), in the same format.
        labels: (rows,), IGNORED where nothing is predicted.
        headroom: factor on the gradient.

    Returns: the loss in fp32, a scalar; the gradient of `hidden`, in its format, times `headroom`.
    """
    loss, grad_logits = _of_logits(hidden, weight, labels, headroom)
    return loss, torch.mm(grad_logits, weight)


def chunk_loss_of_trained(hidden: Tensor, weight: Tensor, labels: Tensor, headroom: float) -> tuple[Tensor, ...]:
    """Calculate the same for a trained head.

    Returns: what `chunk_loss` does, and the gradient of the logits, in the format of `hidden`, times `headroom`.
    """
    loss, grad_logits = _of_logits(hidden, weight, labels, headroom)
    return loss, torch.mm(grad_logits, weight), grad_logits


def _of_logits(hidden: Tensor, weight: Tensor, labels: Tensor, headroom: float) -> tuple[Tensor, Tensor]:
    """Return a chunk's summed loss, and its gradient for the logits times `headroom`, in the format of `hidden`."""
    logits = torch.mm(hidden, weight.t()).float()
    trained = (labels != IGNORED).unsqueeze(1)
    target = labels.clamp(min=0).unsqueeze(1)
    spread = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = torch.where(trained, spread - logits.gather(1, target), 0.0).sum()
    words = torch.arange(weight.shape[0], device=labels.device)
    grad_logits = torch.where(trained, (logits - spread).exp() - (words == target).float(), 0.0)
    return loss, (grad_logits * headroom).to(hidden.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: Chunk,
        mlp_tile: int | None,
        aside: Aside | None,
    ) -> Tensor:
        if aside is not None:
            aside.take()  # of a backward that did not come to its end
        ctx.headroom = _HEADROOM if hidden.dtype is torch.float16 else 1.0
        compiled = chunk not in (chunk_loss, chunk_loss_of_trained) and ctx.needs_input_grad[0]
        size = chunk_rows(hidden.shape[0], weight.shape[0], weight.shape[1] if compiled else 0, mlp_tile)
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        in_bf16 = weight.dtype is torch.bfloat16 and hidden.shape[0] <= _SUMMED_IN_BF16 * size
        format_ = torch.bfloat16 if in_bf16 else torch.float32
        grad_weight = torch.zeros_like(weight, dtype=format_) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            if not ctx.needs_input_grad[0]:
                logits = torch.mm(hidden[rows], weight.t()).float()
                total += torch.nn.functional.cross_entropy(logits, labels[rows], ignore_index=IGNORED, reduction="sum")
                continue
            loss, grad_hidden[rows], *of_logits = chunk(hidden[rows], weight, labels[rows], ctx.headroom)
            total += loss
            if grad_weight is not None and in_bf16:
                grad_weight.addmm_(of_logits[0].t(), hidden[rows])
            elif grad_weight is not None:
                grad_weight.add_(torch.mm(of_logits[0].t(), hidden[rows]))
            of_logits.clear()  # not to be held during the next chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_format, ctx.aside = weight.dtype, aside
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # in fp32: bf16 would round the micro-batch's share by up to 0.4 %, and every gradient with it
        share = grads[0] / ctx.headroom
        of_weight = None if grad_weight is None else _scaled(grad_weight, share).to(ctx.weight_format)
        if ctx.aside is not None and of_weight is not None:
            ctx.aside.put(of_weight)
            of_weight = None
        return (grad_hidden.float() * share).to(grad_hidden.dtype), of_weight, None, None, None, None


def _scaled(gradient: Tensor, share: Tensor) -> Tensor:
    """Multiply in place, a piece at a time in fp32: the gradient of a head is among the largest tensors."""
    for piece in gradient.view(-1).split(_PIECE):
        piece.copy_(piece.float().mul_(share))
    return gradient


def chunk_rows(rows: int, vocabulary: int, hidden_size: int, mlp_tile: int | None = None) -> int:
    """Return the rows of a chunk: all of one size but the last, in as few chunks as alignment allows. More than 64 are
    aligned; for others torch.compile tries out a padded product when it first sees the size, with a copy of the head's
    weight.

    Args:
        hidden_size: 0 where no more than CHUNK_ELEMENTS logits may exist.
        mlp_tile: the most rows that an MLP takes at a time, where it is in tiles.
    """
    together = min(rows, mlp_tile or rows)
    most = max(1, max(CHUNK_ELEMENTS, together * min(_WIDER * hidden_size, vocabulary // _PARTS)) // vocabulary)
    chunks = -(-rows // most)
    even = -(-rows // chunks)
    aligned = -(-even // _ALIGNED) * _ALIGNED
    return aligned if aligned <= most else max(most // _ALIGNED * _ALIGNED, min(even, _ALIGNED))


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: Chunk = chunk_loss,
    mlp_tile: int | None = None,
    aside: Aside | None = None,
) -> Tensor:
    """Sum the loss in nats over the labels that are not IGNORED, in fp32.

    Args:
        hidden: (rows, hidden size).
        weight: the head's, (vocabulary, hidden size).
        labels: (rows,), already shifted.
        chunk: `chunk_loss`, or for a trained head `chunk_loss_of_trained`; or one of them compiled.
        mlp_tile: see `chunk_rows`.
        aside: takes the gradient of a head in the format of the products, for the embeddings that it is tied with.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # the format that a linear layer would use
        dtype = torch.get_autocast_dtype(kind)
        aside = aside if weight.dtype is dtype else None
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(kind, enabled=False):
        total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, mlp_tile, aside)
        return total


def is_in_chunks(causal: Any) -> bool:
    """Return whether `use_chunked_loss` has changed this model."""
    return getattr(own_forward(causal), "__module__", "") == __name__


def own_forward(causal: Any) -> Any:
    """Return the forward that was put on this model, below Trainer's autocast; None where it has its class's.

    accelerate wraps the forward of the model that it trains, which is the causal language model itself where every
    weight is trained, and keeps the former one.
    """
    return causal.__dict__.get("_original_forward") or causal.__dict__.get("forward")


def chunked_row_losses(causal: Any, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Sum the loss in nats of each row, in fp32, of shape (rows,); for a model that `use_chunked_loss` has changed."""
    hidden, head = causal.get_decoder()(**inputs).last_hidden_state, causal.get_output_embeddings()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    with gathered(head):
        return torch.stack([chunked_cross_entropy(h, head.weight, row) for h, row in zip(hidden, shifted, strict=True)])


def use_chunked_loss(model: Any, compiled: bool = False, mlp_tile: int | None = None) -> None:
    """Make the causal language model calculate its loss in chunks whenever it gets labels. Its output then has no
    logits. The model's class is not touched.

    Args:
        compiled: whether a chunk is compiled.
        mlp_tile: see `chunk_rows`.

    Raises: Unsupported when its head is not one matrix, or when its loss is not the cross entropy of that head's
    logits (softcapped or scaled logits, say), found on a few tokens.
    """
    causal = base_of(model)
    whole, decoder, head = causal.forward, causal.get_decoder(), causal.get_output_embeddings()
    plain = isinstance(head, torch.nn.Linear) and head.bias is None and head.weight.is_floating_point()
    if not plain or (has_adapters(model) and head.weight.requires_grad):
        raise Unsupported(
            f"engine.chunked_loss needs a head that is one matrix, and a frozen one next to adapters; that of "
            f"{type(causal).__name__} is not. Use engine.chunked_loss=false."
        )
    _check_default_loss(causal, head)
    chunk: Chunk = chunk_loss_of_trained if head.weight.requires_grad else chunk_loss
    if compiled:
        chunk = torch.compile(chunk, dynamic=False)
    embeddings = causal.get_input_embeddings()
    is_tied = head.weight.requires_grad and embeddings.weight is head.weight
    # a class of its own does more in its forward, as Gemma's
    aside = tie(embeddings) if is_tied and type(embeddings) is torch.nn.Embedding else None

    def forward(labels: Tensor | None = None, num_items_in_batch: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return whole(**inputs)
        inputs.pop("return_dict", None)
        hidden = decoder(**inputs).last_hidden_state
        shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
        with gathered(head):  # here alone: the backward has its gradient already
            rows = hidden.reshape(-1, hidden.shape[-1])
            total = chunked_cross_entropy(rows, head.weight, shifted, chunk, mlp_tile, aside)
        count = (shifted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)

    causal.forward = forward


def _check_default_loss(causal: Any, head: torch.nn.Linear) -> None:
    """Replace the head's logits by known ones, large enough for a cap to change them. The model's loss must be their
    cross entropy, and the head's input must be the decoder's output.

    Raises: Unsupported."""
    ids = torch.arange(3, 19, device=causal.device).unsqueeze(0)
    head_inputs: list[Tensor] = []

    def known(output: Tensor) -> Tensor:
        return (50 * torch.sin(torch.arange(output.numel(), device=output.device))).view_as(output).to(output.dtype)

    def answer(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        head_inputs.append(inputs[0])
        return known(output)

    was_training = causal.training
    evaluation_mode(causal)
    hook = head.register_forward_hook(answer)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            own = causal(input_ids=ids, labels=ids).loss
            hidden = causal.get_decoder()(input_ids=ids).last_hidden_state
            logits = head(hidden).float()  # the hook replaces them here too
    finally:
        hook.remove()
        causal.train(was_training)
    plain = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    if not torch.equal(head_inputs[0], hidden) or not torch.isclose(own.float(), plain, rtol=1e-4):
        raise Unsupported(
            f"engine.chunked_loss is the cross entropy of the head's products, and {type(causal).__name__} does more "
            f"with them: from the same logits it makes {float(own):.4f} nats per token instead of {float(plain):.4f}. "
            "Use engine.chunked_loss=false."
        )
