"""Write down which exact weights were loaded. It is part of the phase `model`."""

from dataclasses import asdict

from lora_lab.base_weights import WEIGHTS
from lora_lab.files import write_json
from lora_lab.worker.exact_weights import exact_weights
from lora_lab.worker.stages.stage import Stage, TrialContext


def _note(trial: TrialContext) -> None:
    config = trial.config
    try:
        found = exact_weights(config.model, digest=config.train.is_job)
        write_json(trial.folder / WEIGHTS, asdict(found))
    except OSError as error:  # a full disk, or a model that was moved meanwhile, must not cost the figures
        trial.warn(f"which weights these are was not written down: {error}")


STAGE = Stage(None, _note)
"""After the model was loaded."""
