"""Load the model with what is trained of it, and count its weights."""

from dataclasses import replace

from lora_lab.options import Init, PlacementKind
from lora_lab.phase import Phase
from lora_lab.worker.members import Members, MembersLora
from lora_lab.worker.models import load_model
from lora_lab.worker.shards import held_and_whole
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.trainables.eva import start_from_rows
from lora_lab.worker.weight_counts import Uncountable, count_model


def _load(trial: TrialContext) -> None:
    sharing = trial.group if trial.config.placement.kind is PlacementKind.fsdp else None
    trained = MembersLora([member.config for member in trial.members]) if trial.members else None
    trial.model = load_model(trial.config, trial.architecture, trial.device, trial.warn, sharing, trained)
    if trained is not None:
        trial.together = Members(trial.model, trained.names)
    if trial.config.method.init is Init.eva:
        start_from_rows(trial.model, trial.config, trial.examples.train, trial.padding)


def _count(trial: TrialContext) -> None:
    sharing = trial.group if trial.config.placement.kind is PlacementKind.fsdp else None
    try:
        counted = count_model(trial.model, trial.config.engine.compiles_whole_layers)
        if sharing is not None:
            counted = replace(counted, weight_bytes=held_and_whole(trial.model)[1])
        trial.emit(counted)
    except Uncountable as error:
        trial.warn(f"FLOPs are not counted: {error}")


STAGE = Stage(Phase.model, _load)
COUNT = Stage(None, _count, each_member=True)
