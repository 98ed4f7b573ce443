"""Compose a trial's config in this process, as the command line does."""

from collections.abc import Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra

from lora_lab.composition.compose import CONF, load, register_schema
from lora_lab.config import TrialConfig


def compose(overrides: Sequence[str]) -> TrialConfig:
    """Return the config of a command line. A key that is given twice has its last value."""
    register_schema()
    GlobalHydra.instance().clear()
    last = {override.partition("=")[0]: override for override in overrides}
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return load(hydra.compose("config", overrides=list(last.values())))
