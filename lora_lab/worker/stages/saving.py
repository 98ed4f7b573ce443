"""Save what was trained, with the tokenizer and chat template that it was trained with."""

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from lora_lab.base_weights import ADAPTER
from lora_lab.options import DataSource
from lora_lab.phase import Phase
from lora_lab.worker.models import load_tokenizer
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.trainables import trainable_of


def _save(trial: TrialContext) -> None:
    what = "adapter"
    try:
        trainable_of(trial.config).save(trial.model, trial.folder)
        what = "tokenizer"
        _save_tokenizer(trial)
    except (OSError, SafetensorError) as error:  # a full disk must not cost the figures
        trial.warn(f"the {what} was not saved: {error}")


def _save_tokenizer(trial: TrialContext) -> None:
    """Write the tokenizer and its chat template next to the adapter, where there is one and text was trained on.

    Raises: OSError."""
    adapter = trial.folder / ADAPTER
    if trial.config.data.source is DataSource.random_tokens or not adapter.is_dir():
        return
    tokenizer = load_tokenizer(trial.config.model)
    _check_room(adapter, len(tokenizer.backend_tokenizer.to_str().encode()))
    tokenizer.save_pretrained(adapter)


def _check_room(folder: Path, size: int) -> None:
    """Raise OSError where `size` bytes do not fit: the library that writes a tokenizer raises a plain Exception there,
    which nothing distinguishes from a defect."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)


STAGE = Stage(Phase.saving, _save, lead_only=True)
