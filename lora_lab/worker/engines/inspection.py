"""Read from a live model which engine runs it, and check what an engine can't do with it."""

import importlib
from typing import Any

import torch

from lora_lab.options import EngineKind
from lora_lab.outcome import Unsupported
from lora_lab.worker.engines.chunked_loss import own_forward
from lora_lab.worker.engines.compiled import compilations, decoder_layers, is_compiled
from lora_lab.worker.engines.graph_step import GraphStep
from lora_lab.worker.trainables.trainable import base_of


def engine_of(model: Any, step: GraphStep | None) -> EngineKind:
    """Return the engine that runs the model: replayed, compiled, with liger's kernels, or none of these."""
    if step is not None and step.replays:
        return EngineKind.graph
    layers = decoder_layers(model)
    # with TORCHDYNAMO_DISABLE set, torch marks layers as compiled and compiles nothing
    if layers and all(map(is_compiled, layers)) and compilations():
        return EngineKind.compile
    if any(_of_liger(module) for module in model.modules()):
        return EngineKind.liger
    return EngineKind.eager


def loss_is_chunked(model: Any) -> bool:
    """Return True where the causal language model's forward is ours or liger's, and not its class's."""
    forward = own_forward(base_of(model))
    return getattr(forward, "__module__", "").startswith(("lora_lab.worker.engines.chunked_loss", "liger_kernel."))


def _of_liger(module: Any) -> bool:
    forward = getattr(module.__dict__.get("forward"), "__func__", None)
    return getattr(forward, "__module__", "").startswith("liger_kernel.")


def has_dropout(model: Any) -> bool:
    """Return True where the frozen model or the adapters have dropout in training."""
    modules = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    # attention's dropout is a number that the kernel gets
    stated = vars(model.config.get_text_config()).items()
    return modules or any(
        name.endswith(("dropout", "pdrop")) and isinstance(value, float) and value > 0 for name, value in stated
    )


def check_liger_support(model: Any) -> None:
    """Raise Unsupported for an architecture that liger leaves unchanged, with no more than a line in its log."""
    kind = model.config.get_text_config().model_type
    known = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if kind not in known:
        raise Unsupported(f"engine=liger: liger-kernel has no kernels for models of type {kind}. Use engine=compile.")
