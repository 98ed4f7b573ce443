"""Convert packaged weights, the first time that they are used."""

from lora_lab.config import PackageConfig
from lora_lab.options import Weights
from lora_lab.packages import converted_folder
from lora_lab.phase import Phase
from lora_lab.worker.pretrained import convert
from lora_lab.worker.stages.stage import Stage, TrialContext


def _unconverted(trial: TrialContext) -> PackageConfig | None:
    model = trial.config.model
    if model.weights is not Weights.pretrained or model.package is None or converted_folder(model.package).is_dir():
        return None
    return model.package


def _is_needed(trial: TrialContext) -> bool:
    return _unconverted(trial) is not None


def _convert(trial: TrialContext) -> None:
    package = _unconverted(trial)
    if package is not None:  # another process may have converted it meanwhile
        convert(package)


STAGE = Stage(Phase.conversion, _convert, _is_needed)
