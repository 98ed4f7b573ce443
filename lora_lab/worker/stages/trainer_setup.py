"""Put the engine and the telemetry on the model, and make its Trainer. It is part of the phase `model`."""

import time

import torch
from transformers import TrainerCallback

from lora_lab.events import Ran
from lora_lab.job_events import Checkpointed
from lora_lab.options import Attention, EngineKind
from lora_lab.phase import Phase
from lora_lab.worker.callback import Telemetry, TelemetryCallback
from lora_lab.worker.checkpoints import Checkpoint, Checkpoints
from lora_lab.worker.data import train_collator
from lora_lab.worker.engines.engine import Engine, shapes
from lora_lab.worker.job_callback import JobTelemetry
from lora_lab.worker.job_plan import JobPlan
from lora_lab.worker.job_trainer import JobTrainer, early_stopping, job_arguments
from lora_lab.worker.members import Members
from lora_lab.worker.members_telemetry import MembersTelemetry
from lora_lab.worker.readback import compare, optimizer_memory, read_back
from lora_lab.worker.shards import held_and_whole, shards_of
from lora_lab.worker.shared_step import SharedStep, check_equal, unequal
from lora_lab.worker.stages.heldout import evaluate, heldout_rows
from lora_lab.worker.stages.job import Job
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.trainables import trainable_of
from lora_lab.worker.training import make_trainer, own_optimizer, space_of, training_arguments


def _set_up(trial: TrialContext) -> None:
    config, model, rows = trial.config, trial.model, trial.examples.train
    collator = train_collator(config, trial.padding)
    shared = (trial.device, trial.emit, trial.clock)
    group, together = trial.group, trial.together
    telemetry: Telemetry
    if together is not None:
        telemetry = MembersTelemetry(config.measure, *shared, together, trial.emit_of)
    elif trial.plan is None:
        telemetry = TelemetryCallback(config.measure, *shared, group)
    else:
        telemetry = JobTelemetry(config.measure, trial.plan, bool(heldout_rows(trial)), *shared, group)
    batches = shapes(config, rows, collator)
    engine = Engine(config, model, batches, telemetry.attention, *shared[1:], fuses=together is None)
    telemetry.watch(model)
    exchange = SharedStep(group, model, telemetry) if group.is_shared else None
    if together is not None:
        together.join(apart=trial.device.type == "cpu", compiles=config.engine.kind is not EngineKind.eager)
        _set_up_members(trial, together, [*engine.callbacks, telemetry])
    elif trial.plan is None or not isinstance(telemetry, JobTelemetry):
        callbacks = [*engine.callbacks, telemetry]
        trial.trainer = make_trainer(
            config, model, rows, collator, callbacks, str(trial.folder), trial.device, exchange
        )
        trial.train = trial.trainer.train
    else:
        _set_up_job(trial, trial.plan, engine, telemetry, exchange)
    engine.attach(trial.trainer)
    if group.is_shared:
        check_equal(group, model, "at the start")
        torch.manual_seed(config.seed + group.rank)  # each draws its own dropout
    telemetry.scaler = trial.trainer.accelerator.scaler
    telemetry.on_stepped = lambda: _report_each(trial, engine, telemetry)


def _set_up_members(trial: TrialContext, together: Members, callbacks: list[TrainerCallback]) -> None:
    """Make a Trainer in which each member has its own learning rate, and its gradients are clipped by themselves."""
    config = trial.config
    groups = [
        {"params": own, "lr": member.config.learning_rate, "weight_decay": config.optimizer.weight_decay}
        for own, member in zip(together.parameters, trial.members, strict=True)
    ]
    trial.trainer = make_trainer(
        config,
        trial.model,
        trial.examples.train,
        train_collator(config, trial.padding),
        callbacks,
        str(trial.folder),
        trial.device,
        groups=groups,
    )
    trial.trainer.accelerator.clip_grad_norm_ = together.clip
    trial.train = trial.trainer.train


def _set_up_job(
    trial: TrialContext, plan: JobPlan, engine: Engine, telemetry: JobTelemetry, shared: SharedStep | None
) -> None:
    config, rows = trial.config, heldout_rows(trial)
    checkpoints = Checkpoints(trial.folder, config.train.keep_checkpoints, trainable_of(config))

    def on_saved(checkpoint: Checkpoint, epoch: float) -> None:
        trial.emit(
            Checkpointed(
                t=time.monotonic(),
                step=checkpoint.step,
                folder=str(checkpoint.folder.relative_to(trial.folder)),
                total_bytes=checkpoint.total_bytes,
                epoch=epoch,
            )
        )

    arguments = training_arguments(
        config, str(checkpoints.root), trial.device, job_arguments(config, plan, evaluates=bool(rows))
    )
    trial.trainer = JobTrainer(
        shared=shared,
        space=space_of(config),
        b_ratio=config.method.b_learning_rate_ratio,
        is_lead=trial.group.is_lead,
        config=config,
        clock=trial.clock,
        telemetry=telemetry,
        checkpoints=checkpoints,
        heldout=lambda step: evaluate(trial, Phase.evaluation, step),
        on_saved=on_saved,
        warn=trial.warn,
        rows_digest=trial.rows_digest,
        model=trial.model,
        args=arguments,
        data_collator=train_collator(config, trial.padding),
        train_dataset=trial.examples.train,
        eval_dataset=rows or None,
        callbacks=[*engine.callbacks, telemetry, *early_stopping(config)],
        optimizer_cls_and_kwargs=own_optimizer(config, arguments),
    )
    trial.train = Job(trial, plan, telemetry, engine, checkpoints).run


def _report_each(trial: TrialContext, engine: Engine, telemetry: Telemetry) -> None:
    """Read back what runs, for each member by itself."""
    if not trial.members:
        _report_what_ran(trial, engine, telemetry)
    for number in range(len(trial.members)):
        with trial.only(number) as own:
            _report_what_ran(own, engine, telemetry)


def _report_what_ran(trial: TrialContext, engine: Engine, telemetry: Telemetry) -> None:
    """Read back what runs.

    Raises: RuntimeError when it is not what was asked for, so that no figure is measured of it."""
    config = trial.config
    facts = read_back(trial.trainer, telemetry.attention.seen) | engine.ran() | _ran_together(trial)
    differences, stand_ins = compare(facts, config, trial.device)
    trial.emit(Ran(t=time.monotonic(), facts=facts, stand_ins=stand_ins))
    trial.emit(optimizer_memory(trial.trainer))
    if "math" in facts["attention_kernel"] and config.attention is Attention.sdpa:
        trial.warn("attention=sdpa runs torch's plain math kernel here, not a fused one: compare its figures with care")
    if differences:
        raise RuntimeError("what ran is not what was asked for: " + "; ".join(differences))


def _ran_together(trial: TrialContext) -> dict[str, str]:
    """Read back how the workers of a group share the trial; nothing for a worker alone."""
    group = trial.group
    if not group.is_shared:
        return {}
    found = {
        "world_size": str(group.world_size),
        "gradients_carried_by": group.backend,
        "adapters_equal": str(not unequal(group, trial.model)),
    }
    if shards_of(trial.model) is not None:
        held, whole = max(group.gather(held_and_whole(trial.model)))
        found["base_bytes_held"] = f"{held} of {whole}"
    return found


STAGE = Stage(None, _set_up)
