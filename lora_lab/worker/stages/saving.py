"""Save what was trained, with the tokenizer and chat template that it was trained with."""

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from lora_lab.config import TrialConfig
from lora_lab.options import DataSource
from lora_lab.phase import Phase
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.tokenizer_files import load_tokenizer
from lora_lab.worker.trainables import trainable_of


def _save(trial: TrialContext) -> None:
    trained = trainable_of(trial.config)
    what, folder = trained.name, trial.folder / trained.name
    try:
        trained.write(trial.model, folder)
        what = "tokenizer"
        _save_tokenizer(trial.config, folder)
    except (OSError, SafetensorError) as error:  # a full disk must not cost the figures
        trial.warn(f"the {what} was not saved: {error}")


def _save_tokenizer(config: TrialConfig, folder: Path) -> None:
    """Write the tokenizer and its chat template next to what was trained, if that was on text.

    Raises: OSError."""
    if config.data.source is DataSource.random_tokens:
        return
    tokenizer = load_tokenizer(config.model)
    _check_room(folder, len(tokenizer.backend_tokenizer.to_str().encode()))
    tokenizer.save_pretrained(folder)


def _check_room(folder: Path, size: int) -> None:
    """Raise OSError where `size` bytes do not fit: the library that writes a tokenizer raises a plain Exception there,
    which nothing distinguishes from a defect."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)


STAGE = Stage(Phase.saving, _save, lead_only=True, each_member=True)
