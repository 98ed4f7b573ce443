"""Write down which exact weights were loaded. It is part of the phase `model`."""

from dataclasses import asdict

from lora_lab.base_weights import WEIGHTS, BaseWeights
from lora_lab.config import InvalidInput
from lora_lab.files import write_json
from lora_lab.worker.exact_weights import exact_weights, noted_weights
from lora_lab.worker.stages.stage import Stage, TrialContext


def _note(trial: TrialContext) -> None:
    config = trial.config
    try:
        found = exact_weights(config.model, digest=config.train.is_job)
        if config.resume:
            _check_same(trial, found)
        write_json(trial.folder / WEIGHTS, asdict(found))
    except OSError as error:  # a full disk, or a model that was moved meanwhile, must not cost the figures
        trial.warn(f"which weights these are was not written down: {error}")


def _check_same(trial: TrialContext, found: BaseWeights) -> None:
    """Raise InvalidInput when a job would go on with other weights than it began with: a branch of the hub moves on,
    and a folder can be written to."""
    before = noted_weights(trial.folder)
    if before is not None and before.named() != found.named():
        raise InvalidInput(
            f"the job has been trained on {before.named()}, and its model is now {found.named()}. Put those weights "
            "back, or start a new job."
        )


STAGE = Stage(None, _note, lead_only=True, each_member=True)
"""After the model was loaded."""
