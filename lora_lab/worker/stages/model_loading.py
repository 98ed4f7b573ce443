"""Load the model with what is trained of it, and count its weights."""

from lora_lab.phase import Phase
from lora_lab.worker.models import load_model
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.weight_counts import Uncountable, count_model


def _load(trial: TrialContext) -> None:
    trial.model = load_model(trial.config, trial.architecture, trial.device, trial.warn)
    try:
        trial.emit(count_model(trial.model))
    except Uncountable as error:
        trial.warn(f"FLOPs are not counted: {error}")


STAGE = Stage(Phase.model, _load)
