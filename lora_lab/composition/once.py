"""Compose one config from a command line, for commands that look at a trial and do not run it."""

import sys
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from lora_lab.composition.arguments import in_order
from lora_lab.composition.compose import CONF, load, register_schema
from lora_lab.composition.hydra_errors import COMPOSING
from lora_lab.config import InvalidInput, TrialConfig

_NO_FOLDER = ("hydra.run.dir=.", "hydra.mode=RUN")
"""Hydra makes the folder of a run, and this one is there."""


def compose_once(arguments: Sequence[str], own: Sequence[str] = ()) -> TrialConfig:
    """Return the config that these arguments compose to, as the command line of a trial does.

    Args:
        own: the command's own options, for the message on an unknown one.

    Raises: InvalidInput for a faulty config; SystemExit with code 2, after a message, for what Hydra cannot compose."""
    found: list[DictConfig] = []

    def keep(composed: DictConfig) -> None:
        COMPOSING.over()
        found.append(composed)

    register_schema()
    with COMPOSING:
        typed = in_order(arguments, own)
        if {"-m", "--multirun"} & set(typed) or any(word.startswith("sweep=") for word in typed):
            raise InvalidInput("this looks at one configuration, not at a sweep. Leave -m and sweep=NAME out.")
        sys.argv[1:] = [*typed, *_NO_FOLDER]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(keep)()
    if not found:  # Hydra showed something, for example --cfg
        raise SystemExit(0)
    return load(found[0])
