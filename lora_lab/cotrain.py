"""Points of a sweep that train together: several adapters on one frozen base, in one worker."""

from dataclasses import dataclass
from pathlib import Path

from lora_lab.config import TrialConfig

FACTORS = {"rank": "method.rank", "alpha": "method.alpha", "learning_rate": "learning_rate"}
"""What may differ between members, by the name that `cotrain` has for it: the setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of the trials that train together."""

    config: TrialConfig
    folder: Path
    """The folder of all its files."""
