"""The methods: what each one trains of a model. A new method is a file here and its line in `trainable_of`."""

from lora_lab.config import TrialConfig
from lora_lab.options import MethodKind
from lora_lab.worker.trainables.full import Full
from lora_lab.worker.trainables.lora import Lora
from lora_lab.worker.trainables.trainable import Trainable
from lora_lab.worker.trainables.vera import Vera


def trainable_of(config: TrialConfig) -> Trainable:
    """Return what the trial's method trains."""
    if config.method.kind is MethodKind.full:
        return Full(config.method)
    return Vera(config) if config.method.kind is MethodKind.vera else Lora(config)
