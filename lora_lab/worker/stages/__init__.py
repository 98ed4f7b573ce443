"""The stages of a trial. A new stage is a file here and a line in STAGES."""

from lora_lab.worker.stages import (
    answering,
    conversion,
    data_loading,
    heldout,
    model_loading,
    preparation,
    saving,
    screening,
    trainer_setup,
    training_steps,
    weights_noting,
)
from lora_lab.worker.stages.stage import Stage

STAGES: tuple[Stage, ...] = (
    preparation.STAGE,
    conversion.STAGE,
    data_loading.STAGE,
    model_loading.STAGE,
    model_loading.COUNT,
    weights_noting.STAGE,
    screening.STAGE,
    trainer_setup.STAGE,
    heldout.BEFORE,
    training_steps.STAGE,
    heldout.AFTER,
    saving.STAGE,
    answering.STAGE,
)
"""In the order in which they run."""
