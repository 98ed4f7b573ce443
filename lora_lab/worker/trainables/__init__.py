"""The methods: what each one trains of a model. A new method is a file here and its line in `trainable_of`."""

from lora_lab.config import TrialConfig
from lora_lab.worker.trainables.lora import Lora
from lora_lab.worker.trainables.trainable import Trainable


def trainable_of(config: TrialConfig) -> Trainable:
    """Return what the trial's method trains. All methods of conf/method are LoRA today."""
    return Lora(config)
