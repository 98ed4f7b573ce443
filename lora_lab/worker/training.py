"""Make transformers' Trainer for a measured window, by constructor arguments only; nothing is patched."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.method_config import OptimizerConfig
from lora_lab.options import Checkpointing, DType, MethodKind
from lora_lab.worker.adamw_8bit import AdamW8bit
from lora_lab.worker.data import Collator, Example
from lora_lab.worker.descent import RoundedDescent
from lora_lab.worker.engines.engine import checkpoints_by_trainer, trainer_arguments
from lora_lab.worker.in_backward import InBackward
from lora_lab.worker.low_rank import Projected, Space
from lora_lab.worker.pieces import InPieces
from lora_lab.worker.rounding import Rounded
from lora_lab.worker.shared_step import SharedStep, SharingTrainer

TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")
"""transformers' names of torchao's optimizers."""
_BY_ELEMENT = ("adamw_torch", "adamw_torch_fused")
"""Optimizers that treat each element by itself. bitsandbytes' do not: they know the embeddings by their weight."""


def make_trainer(
    config: TrialConfig,
    model: Any,
    examples: Sequence[Example],
    collator: Collator,
    callbacks: list[TrainerCallback],
    folder: str,
    device: torch.device,
    shared: SharedStep | None = None,
    groups: list[dict[str, Any]] | None = None,
) -> Trainer:
    """Make a Trainer that takes warm-up, measured and profiled steps and does not log, save or evaluate by itself.

    Args:
        shared: exchanges its steps with other workers; None for a worker alone.
        groups: the optimizer's parameter groups, where they are not Trainer's own.
    """
    profiled = config.measure.profile_steps if device.type == "cuda" else 0
    steps = config.measure.warmup_steps + config.measure.steps + profiled
    more = {"max_steps": steps, "lr_scheduler_type": "constant", "save_strategy": "no"}
    arguments = training_arguments(config, folder, device, more)
    return SharingTrainer(
        shared=shared,
        space=space_of(config),
        b_ratio=config.method.b_learning_rate_ratio,
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=examples,  # any sized sequence serves
        callbacks=callbacks,
        optimizer_cls_and_kwargs=own_optimizer(config, arguments, groups),
    )


def training_arguments(config: TrialConfig, folder: str, device: torch.device, more: dict[str, Any]) -> Any:
    """Make TrainingArguments from what windows and jobs share, and `more`."""
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum_steps,
        gradient_checkpointing=checkpoints_by_trainer(config),
        gradient_checkpointing_kwargs=checkpointing_arguments(config),
        learning_rate=config.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer.optim or "adamw_torch",
        fp16=config.precision.dtype is DType.fp16 and device.type == "cuda",
        bf16=config.precision.dtype is DType.bf16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        dataloader_drop_last=True,
        remove_unused_columns=False,
        seed=config.seed,
        data_seed=config.seed,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it hides a diverged loss, and synchronises
        **trainer_arguments(config),
        **more,
    )


def checkpointing_arguments(config: TrialConfig) -> dict[str, Any] | None:
    """Return TrainingArguments.gradient_checkpointing_kwargs; None where Trainer does no checkpointing."""
    if not checkpoints_by_trainer(config):
        return None
    return {
        "use_reentrant": False,
        "preserve_rng_state": True,  # so that dropout repeats its random numbers
        "every_n_layers": 2 if config.gradient_checkpointing is Checkpointing.selective else 1,
    }


def own_optimizer(
    config: TrialConfig, arguments: Any, groups: list[dict[str, Any]] | None = None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Return an optimizer's class and arguments; None where transformers makes it.

    Args:
        arguments: the trial's TrainingArguments.
        groups: its parameter groups, where they are not Trainer's own."""
    asked, rounds = config.optimizer, config.method.held_in is DType.bf16
    in_pieces = _in_pieces(config)
    if groups is not None:
        kind, given = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return kind, {**given, "params": groups}
    if asked.target is not None:
        kind, given = optimizer_class(asked.target), {"lr": config.learning_rate, **asked.args}
    elif asked.projection is not None or asked.in_backward or rounds or in_pieces:
        kind, given = Trainer.get_optimizer_cls_and_kwargs(arguments)
    else:
        return None
    mixed: list[type] = [Projected] if asked.projection is not None else []
    if rounds and asked.optim in TORCHAO:
        given = {**given, "bf16_stochastic_round": True}  # within the kernel that it compiles
    elif rounds and asked.optim == "sgd" and asked.projection is None:
        mixed.append(RoundedDescent)
    elif rounds and (asked.projection is not None or not issubclass(kind, AdamW8bit)):
        mixed.append(Rounded)
    mixed += [InPieces] if in_pieces else []
    mixed += [InBackward] if asked.in_backward else []
    for part in mixed:  # under its own name, by which transformers and the read-back know it
        kind = type(kind.__name__, (part, kind), {"__module__": kind.__module__})
    return kind, given


def _in_pieces(config: TrialConfig) -> bool:
    """Return whether a step would hold much for the largest weight: copies in fp32 to round it, or what torchao's
    kernels take."""
    asked, rounds = config.optimizer, config.method.held_in is DType.bf16
    if config.method.kind is not MethodKind.full or asked.projection is not None:
        return False
    return asked.optim in TORCHAO or (rounds and asked.optim in _BY_ELEMENT)


def space_of(config: TrialConfig) -> Space | None:
    """Return how the optimizer projects gradients; None where it does not."""
    asked = config.optimizer
    return asked.projection and Space(asked.projection, asked.projection_rank, asked.projection_steps)


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Raise InvalidInput unless the optimizer exists and takes its arguments; builds no state."""
    if optimizer.target is None:
        _check_package(optimizer.optim)
        known = [name.value for name in OptimizerNames]
        if optimizer.optim not in known:
            raise InvalidInput(
                f"optimizer.optim={optimizer.optim} is not known to transformers; it knows {', '.join(known)}."
            )
        return
    kind = optimizer_class(optimizer.target)
    probe = [torch.nn.Parameter(torch.zeros(1))]
    try:
        kind(probe, lr=1e-3, **optimizer.args)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"optimizer.args={optimizer.args} does not fit {optimizer.target}: {error}") from error


def _check_package(optim: str | None) -> None:
    """Raise InvalidInput for an optimizer whose package is not installed."""
    if optim in TORCHAO and importlib.util.find_spec("torchao") is None:
        raise InvalidInput(
            f"optimizer.optim={optim} needs the package torchao. Type pip install 'lora_lab[torchao]', or use "
            "optimizer=adamw_8bit, which keeps its state in 8 bit by bitsandbytes."
        )


def optimizer_class(target: str) -> type[torch.optim.Optimizer]:
    """Import an optimizer by its path.

    Raises: InvalidInput when the import fails, or it is not a torch.optim.Optimizer.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two for paths with stray dots
        raise InvalidInput(
            f"optimizer.target={target} cannot be imported: {error}. Give an import path such as torch.optim.SGD."
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise InvalidInput(
            f"optimizer.target={target} is not a torch.optim.Optimizer class; for example torch.optim.SGD is."
        )
    return found
