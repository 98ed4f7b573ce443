"""Probe a loaded model, before adapters: which modules does text reach, and which tokens does a token attend to?

The gradient answers. Where a token's logits do not depend on another token, their gradient for its embedding is exactly
zero, in any number format. A comparison of logits would have to distinguish a small leak from rounding: a mixture of
experts multiplies in other groups once another document's tokens change.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.options import Batching
from lora_lab.worker.data import Example, pack, train_collator
from lora_lab.worker.quantised import evaluation_mode

_TOKENS = 12
"""In each of two documents."""

_NOTHING = 1e-6
"""A gradient below this share of the document's own is none: 16-bit formats could not show its effect."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the probe found. Gradients are shares of the largest one for the last document's own tokens; both are None
    where the logits have no gradient."""

    later: float | None
    """The gradient of a token's logits on the tokens after it."""
    other_document: float | None
    """The gradient of the last document's logits on the document before; 0.0 where documents are not packed."""
    unreached: list[str]
    """Names of the largest parts of the model that text does not run through."""


def look_through(model: Any, config: TrialConfig, device: torch.device, dtype: torch.dtype) -> Seen:
    """Run a few tokens through `model` as the trial lays them out, forward and backward."""
    inputs, start = _inputs(model, config, device)
    middle = start + _TOKENS // 2
    # all of the last document: a convolution may see no further back than a few tokens
    document = slice(start, start + _TOKENS)
    sizes, reached = _gradients(model, inputs, [slice(middle, middle + 1), document], dtype)
    unreached = _largest(model, reached)
    if sizes is None or not all(float(size[document].max()) > 0 for size in sizes):
        return Seen(None, None, unreached)
    of_middle, of_document = (size / size[document].max() for size in sizes)
    other = float(of_document[:start].max()) if start else 0.0
    return Seen(float(of_middle[middle + 1 :].max()), other, unreached)


def judge(seen: Seen, config: TrialConfig, name: str) -> list[str]:
    """Raise InvalidInput for a fault that the probe found.

    Returns: what the user should know."""
    if seen.later is None or seen.other_document is None:
        return ["which tokens a token sees could not be found out: the model's logits have no gradient"]
    if seen.later > _NOTHING:
        raise InvalidInput(
            f"the model ({name}) is not causal: a token's logits depend on the tokens after it, which are what it is "
            "trained to predict. Use a causal language model."
        )
    if seen.other_document > _NOTHING:
        raise InvalidInput(
            f"data.batching=packed with attention={config.attention.value}: in the model ({name}) a packed document "
            "sees the one before it. Use data.batching=longest."
        )
    return []


def _inputs(model: Any, config: TrialConfig, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Make a batch of one row as the trial lays it out; return it, and where its last document starts."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (_TOKENS,), generator=generator).tolist() for _ in range(2)]
    packed = config.data.batching is Batching.packed
    documents = [Example(row, row) for row in rows[: 2 if packed else 1]]
    laid = pack(documents, 2 * _TOKENS) if packed else documents
    batch = train_collator(config, 0)(laid)
    del batch["labels"]
    # some padding where the trial has any, but not all: over a row of seq_len the logits would take more memory than
    # the training does
    wide = _TOKENS * (len(documents) + 1)
    tensors = {name: t[:, :wide].to(device) for name, t in batch.items() if isinstance(t, Tensor)}
    return tensors, _TOKENS * (len(documents) - 1)


def _gradients(
    model: Any, inputs: dict[str, Tensor], looked_at: list[slice], dtype: torch.dtype
) -> tuple[list[Tensor] | None, set[nn.Module]]:
    """Measure how much the logits of some tokens depend on each token's embedding.

    Returns: for each of `looked_at` the largest gradient on each token, of shape (tokens,), None where there is no
        gradient; and the modules that ran.
    """
    embedded: list[Tensor] = []
    reached: set[nn.Module] = set()

    def note(module: nn.Module, *_: Any) -> None:
        reached.add(module)

    def follow(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.requires_grad_())
        return output

    device = inputs["input_ids"].device
    was_training = model.training
    evaluation_mode(model)
    hooks = [module.register_forward_hook(note) for module in model.modules()]
    hooks.append(model.get_input_embeddings().register_forward_hook(follow))
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            logits = model(**inputs, use_cache=False).logits[0].float()
        # random weights: in a plain sum, gradients could cancel out
        weighted = logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
        found = [
            torch.autograd.grad(weighted[which].sum(), embedded[:1], allow_unused=True, retain_graph=True)
            for which in looked_at
        ]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(was_training)
    gradients = [each[0] for each in found if each and each[0] is not None]
    if len(gradients) < len(looked_at):
        return None, reached
    return [each[0].float().abs().amax(dim=-1).nan_to_num(nan=torch.inf) for each in gradients], reached


def _largest(model: nn.Module, reached: set[nn.Module]) -> list[str]:
    """Name the largest modules with weights of which no part ran. Nothing within a layer that ran is named: other
    tokens will choose the experts that these few did not."""
    found: list[str] = []

    def look(module: nn.Module, name: str) -> None:
        parts = set(module.modules())
        if not parts & reached and any(True for _ in module.parameters()):
            found.append(name)
        elif not (isinstance(module, GradientCheckpointingLayer) and module in reached):
            for child, part in module.named_children():
                look(part, f"{name}.{child}" if name else child)

    look(model, "")
    return found
