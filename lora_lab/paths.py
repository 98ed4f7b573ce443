"""Folders that several parts of lora_lab must agree on."""

import os
from pathlib import Path

MULTIRUN = Path("multirun")
"""Where conf/config.yaml puts the folders of trials and sweeps."""


def cache_folder() -> Path:
    """Return where converted weights and compiled code are kept: $XDG_CACHE_HOME/lora_lab, by default
    ~/.cache/lora_lab."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_lab"
