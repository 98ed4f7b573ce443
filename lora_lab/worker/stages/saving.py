"""Save what was trained."""

from safetensors import SafetensorError

from lora_lab.events import Phase
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.trainables import trainable_of


def _save(trial: TrialContext) -> None:
    try:
        trainable_of(trial.config).save(trial.model, trial.folder)
    except (OSError, SafetensorError) as error:  # a full disk must not cost the figures
        trial.warn(f"the adapter was not saved: {error}")


STAGE = Stage(Phase.saving, _save)
