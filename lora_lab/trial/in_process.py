"""Prepare this process itself to load a model, for commands that use one and do not train."""

import logging
import os

from lora_lab.config import TrialConfig
from lora_lab.trial.devices import choose_placement, worker_environment


def prepare_process(config: TrialConfig) -> None:
    """Show this process the first card, or none where the trial ran on the CPU. Call it before torch is imported.

    Raises: InvalidInput where the driver does not answer."""
    os.environ.update(worker_environment(choose_placement("cpu" if config.device == "cpu" else "auto")))
    # while it is imported, it says which faster kernels it could download
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
