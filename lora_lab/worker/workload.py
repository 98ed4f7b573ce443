"""Count the work of a trial before it runs: its micro-batches as they will be laid out, and the model's products. The
imports at the top need no torch: the parent has them too."""

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_lab.config import TrialConfig
from lora_lab.options import DataSource
from lora_lab.work import MicroBatch, ModelFacts, Workload

if TYPE_CHECKING:
    from lora_lab.worker.data import Collator, Example
    from lora_lab.worker.examples import Examples


def workload(config: TrialConfig) -> Workload:
    """Read and tokenise the rows as the trial would, and plan it. No weights are loaded, and no device is used.

    Raises: InvalidInput."""
    from lora_lab.worker.check import checked_examples
    from lora_lab.worker.models import load_architecture

    architecture = load_architecture(config.model)
    examples, padding = checked_examples(config, architecture)
    general = general_of(config, architecture)
    return work_on(config, model_facts(config, architecture), examples, padding, general)


def general_of(config: TrialConfig, architecture: Any) -> "list[Example]":
    """Return the general text that is evaluated before and after; none where that was not asked for."""
    from lora_lab.worker.general_text import general_examples, general_rows
    from lora_lab.worker.tokenizer_files import load_tokenizer

    if not general_rows(config):
        return []
    return general_examples(config, load_tokenizer(config.model), architecture.get_text_config().vocab_size)


def work_on(
    config: TrialConfig,
    model: ModelFacts,
    examples: "Examples",
    padding: int,
    general: "list[Example]",
    most: int | None = None,
) -> Workload:
    """Plan the work on rows that are tokens already.

    Args:
        padding: the token that rows are padded with.
        most: how many of the epoch's micro-batches are laid out, the first of their random order; None for all.

    Raises: InvalidInput."""
    from lora_lab.worker.answers import answers_asked, questions
    from lora_lab.worker.data import Collator, train_collator
    from lora_lab.worker.job_plan import plan_job
    from lora_lab.worker.stages.data_loading import counted

    order = list(range(len(examples.train)))
    random.Random(config.seed).shuffle(order)
    steps, steps_per_epoch, evaluations, checkpoints = _window(config, len(order))
    full_steps = float(steps_per_epoch)
    if config.train.is_job:
        plan = plan_job(config, len(order))
        steps, steps_per_epoch = plan.steps, plan.steps_per_epoch
        full_steps = len(order) // config.batch_size / config.grad_accum_steps
        evaluations = sum(plan.evaluates_after(step) for step in range(1, steps)) + 1
        checkpoints = sum(plan.saves_after(step) for step in range(1, steps)) + plan.saves
    rows = [examples.train[place] for place in order[: None if most is None else most * config.batch_size]]
    heldout = examples.heldout[: config.measure.eval_rows]
    as_evaluated = Collator(pad_id=padding)
    asked = 0 if config.data.source is DataSource.random_tokens else answers_asked(config)
    return Workload(
        model=model,
        data=counted(examples, config.seq_len),
        epoch=_batches(rows, config.batch_size, train_collator(config, padding), whole=True),
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        epoch_in_full_steps=full_steps,
        evaluations=evaluations if heldout else 0,
        checkpoints=checkpoints,
        heldout=_batches(heldout, config.batch_size, as_evaluated),
        general=_batches(general, config.batch_size, as_evaluated),
        answers=2 * len(questions(examples.heldout, asked)),
    )


def _window(config: TrialConfig, rows: int) -> tuple[int, int, int, int]:
    """Return steps, steps of an epoch, evaluations and checkpoints of a measured window."""
    per_epoch = max(1, rows // config.batch_size // config.grad_accum_steps)
    return config.measure.warmup_steps + config.measure.steps, per_epoch, 0, 0


def _batches(examples: "list[Example]", batch_size: int, collator: "Collator", whole: bool = False) -> list[MicroBatch]:
    """Return the micro-batches of examples; with `whole` without the last one where it is not full."""
    made = []
    for start in range(0, len(examples), batch_size):
        some = examples[start : start + batch_size]
        if whole and len(some) < batch_size:
            break
        made.append(
            MicroBatch(
                rows=len(some),
                width=collator.width_of(some),
                real=sum(len(example.ids) for example in some),
                trained=sum(example.trained for example in some),
                attended=sum(length * length for example in some for length in example.document_lengths),
            )
        )
    return made


def model_facts(config: TrialConfig, architecture: Any) -> ModelFacts:
    """Count the model with what is trained of it on the meta device.

    Raises: InvalidInput when it cannot be trained as asked."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    from lora_lab.worker.checkpoint import make_skeleton
    from lora_lab.worker.trainables import trainable_of
    from lora_lab.worker.trainables.trainable import has_adapters
    from lora_lab.worker.weight_counts import Uncountable, count_model

    skeleton = make_skeleton(config, architecture)
    trainable_of(config).check(skeleton)  # which puts the adapters on it
    try:
        counted = replace(count_model(skeleton, config.engine.compiles_whole_layers), t=0.0)
    except Uncountable:
        counted = None
    layers = [module for module in skeleton.modules() if isinstance(module, GradientCheckpointingLayer)]
    is_added = has_adapters(skeleton)
    own = [
        module
        for layer in layers
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear) and not (is_added and module.weight.requires_grad)
    ]
    shapes = architecture.get_text_config()
    return ModelFacts(
        counted=counted,
        layers=len(layers),
        linears=len(own),
        widths=sum(linear.in_features + linear.out_features for linear in own),
        matrices=sum(p.requires_grad for p in skeleton.parameters()),
        hidden=shapes.hidden_size,
        vocabulary=shapes.vocab_size,
    )
