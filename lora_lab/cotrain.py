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


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """What a trial's record says of the job that it trained in."""

    members: int
    job: str
    """The name of the first member's folder, which has the worker's log."""

    @property
    def facts(self) -> dict[str, str]:
        """Return them as tags."""
        return {
            "cotrain.members": str(self.members),
            "cotrain.job": self.job,
            "cotrain.shares": "time, memory and power are those of the whole job; its energy is divided by the "
            "members, which train on the same tokens",
        }
