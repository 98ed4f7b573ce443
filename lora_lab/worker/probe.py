"""One look through a loaded model, before adapters: what does text reach, and what does a token see?

The question is put to the gradient. Where a token's logits do not depend on another token, their gradient on its
embedding is exactly zero, whatever the number format. A comparison of logits would have to tell a small leak from
rounding: a mixture of experts multiplies in other groups once another document's tokens change.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_lab.config import Batching, RefusedInput, TrialConfig
from lora_lab.worker.data import Example, pack, train_collator
from lora_lab.worker.quantised import evaluation_mode

_TOKENS = 12
"""In each of two documents."""

_NOTHING = 1e-6
"""A gradient below this share of the document's own is none: 16-bit formats could not show its effect."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the look found. Gradients are shares of the largest one on the document's own tokens up to the one that is
    looked at; both are None where the logits have no gradient, so that nothing can be said."""

    later: float | None
    """The gradient on tokens after the one that is looked at."""
    other_document: float | None
    """The gradient on the document before; 0.0 where documents are not packed."""
    unreached: list[str]
    """Names of the largest parts of the model that text does not run through."""


def look_through(model: Any, config: TrialConfig, device: torch.device, dtype: torch.dtype) -> Seen:
    """Run a few tokens through `model` as the trial lays them out, forward and backward."""
    inputs, start = _inputs(model, config, device)
    looked_at = start + _TOKENS // 2
    gradient, reached = _gradient(model, inputs, looked_at, dtype)
    unreached = _largest(model, reached)
    if gradient is None:
        return Seen(None, None, unreached)
    size = gradient.float().abs().amax(dim=-1).nan_to_num(nan=torch.inf)
    own = float(size[start : looked_at + 1].max())
    if not own > 0:
        return Seen(None, None, unreached)
    later, other = size[looked_at + 1 :], size[:start]
    return Seen(float(later.max()) / own, float(other.max()) / own if start else 0.0, unreached)


def judge(seen: Seen, config: TrialConfig, name: str) -> list[str]:
    """Raise RefusedInput for what the look found to be wrong.

    Returns: what the user should know."""
    if seen.later is None or seen.other_document is None:
        return ["which tokens a token sees could not be found out: the model's logits have no gradient"]
    if seen.later > _NOTHING:
        raise RefusedInput(
            f"the model ({name}) is not causal: a token's logits depend on the tokens after it, which are what it is "
            "trained to predict. Use a causal language model."
        )
    if seen.other_document > _NOTHING:
        raise RefusedInput(
            f"data.batching=packed with attention={config.attention.value}: in the model ({name}) a packed document "
            "sees the one before it. Use data.batching=longest."
        )
    return []


def _inputs(model: Any, config: TrialConfig, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """A batch of one row as the trial has them, and where its last document starts."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (_TOKENS,), generator=generator).tolist() for _ in range(2)]
    packed = config.data.batching is Batching.packed
    documents = [Example(row, row) for row in rows[: 2 if packed else 1]]
    laid = pack(documents, 2 * _TOKENS) if packed else documents
    batch = train_collator(config, 0)(laid)
    del batch["labels"]
    return {name: t.to(device) for name, t in batch.items() if isinstance(t, Tensor)}, _TOKENS * (len(documents) - 1)


def _gradient(
    model: Any, inputs: dict[str, Tensor], looked_at: int, dtype: torch.dtype
) -> tuple[Tensor | None, set[nn.Module]]:
    """The gradient of one token's logits on the embeddings, of shape (tokens, width), None where there is none; and the
    modules that ran."""
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
            logits = model(**inputs, use_cache=False).logits[0, looked_at].float()
        # random weights: in a plain sum, gradients could cancel out
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
        found = torch.autograd.grad((logits * weights).sum(), embedded[:1], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(was_training)
    return (found[0][0] if found and found[0] is not None else None), reached


def _largest(model: nn.Module, reached: set[nn.Module]) -> list[str]:
    """The largest modules with weights of which no part ran. Within a layer that ran nothing is named: an expert that
    these few tokens did not choose is one that others do."""
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
