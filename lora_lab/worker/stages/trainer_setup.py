"""Put the engine and the telemetry on the model, and make its Trainer. It is part of the phase `model`."""

import time

from lora_lab.events import Ran
from lora_lab.options import Attention
from lora_lab.worker.callback import TelemetryCallback
from lora_lab.worker.data import train_collator
from lora_lab.worker.engines.engine import Engine, shapes
from lora_lab.worker.readback import compare, optimizer_memory, read_back
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.training import make_trainer


def _set_up(trial: TrialContext) -> None:
    config, model, rows = trial.config, trial.model, trial.examples.train
    collator = train_collator(config, trial.padding)
    callback = TelemetryCallback(config.measure, trial.device, trial.emit, trial.clock)
    engine = Engine(config, model, shapes(config, rows, collator), callback.attention, trial.emit, trial.clock)
    callback.watch(model)
    callbacks = [*engine.callbacks, callback]
    trial.trainer = make_trainer(config, model, rows, collator, callbacks, str(trial.folder), trial.device)
    engine.attach(trial.trainer)
    callback.scaler = trial.trainer.accelerator.scaler
    callback.on_stepped = lambda: _report_what_ran(trial, engine, callback)


def _report_what_ran(trial: TrialContext, engine: Engine, callback: TelemetryCallback) -> None:
    """Read back what runs.

    Raises: RuntimeError when it is not what was asked for, so that no figure is measured of it."""
    config = trial.config
    facts = read_back(trial.trainer, callback.attention.seen) | engine.ran()
    differences, stand_ins = compare(facts, config, trial.device)
    trial.emit(Ran(t=time.monotonic(), facts=facts, stand_ins=stand_ins))
    trial.emit(optimizer_memory(trial.trainer))
    if "math" in facts["attention_kernel"] and config.attention is Attention.sdpa:
        trial.warn("attention=sdpa runs torch's plain math kernel here, not a fused one: compare its figures with care")
    if differences:
        raise RuntimeError("what ran is not what was asked for: " + "; ".join(differences))


STAGE = Stage(None, _set_up)
