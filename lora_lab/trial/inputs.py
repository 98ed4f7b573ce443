"""Check what can be seen of a trial's input without torch: files, folders and packages."""

import contextlib
import os
from pathlib import Path

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.dataset.selection import check_rows
from lora_lab.options import DataSource, ModelSource, TrackingKind, Weights
from lora_lab.packages import converted_folder, locate
from lora_lab.secrets import without_secrets
from lora_lab.store.local_store import check_writable


def check_inputs(config: TrialConfig) -> None:
    """Raise InvalidInput for faults that can be seen without torch: in files, folders and packages."""
    check_data(config)
    if config.model.weights is Weights.pretrained:
        package = config.model.package
        if config.model.source is ModelSource.package and package and not converted_folder(package).is_dir():
            locate(package)
        if config.model.source is ModelSource.local and not (Path(str(config.model.path)) / "config.json").is_file():
            raise InvalidInput(
                f"model.path={config.model.path} holds no config.json (looked in {Path.cwd()}). "
                "Give a folder that save_pretrained wrote."
            )
    if config.tracking.kind is TrackingKind.local:
        check_writable(config.tracking)


def check_data(config: TrialConfig) -> None:
    """Raise InvalidInput for rows in files that cannot be read, or are too few."""
    if config.data.source in (DataSource.file, DataSource.shipped):
        check_rows(config.data, config.rows_per_step)


def check_folder_name(folder: Path) -> None:
    """Raise InvalidInput for a folder whose name holds a secret; the name would be in every record."""
    name = os.path.relpath(folder)
    if without_secrets(name) != name:
        with contextlib.suppress(OSError):  # Hydra has made it already
            folder.rmdir()
        raise InvalidInput(
            "the name of the folder for the results (hydra.run.dir, hydra.sweep.dir) holds a password or token and "
            "would be written into the record. Give another name."
        )
