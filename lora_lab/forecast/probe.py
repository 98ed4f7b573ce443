"""Measure a few steps on real rows, as an ordinary trial in the folder and the store of all trials."""

import math
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.paths import MULTIRUN

ROWS = 50
SECONDS = 30.0
_FEWEST_STEPS = 8
_WARMUP_STEPS = 3


def probe(typed: Sequence[str], config: TrialConfig, step_seconds: float) -> Path:
    """Run a short trial of these settings and return its folder.

    Args:
        typed: the overrides that the config was composed from.
        step_seconds: what a step probably takes.

    Raises: InvalidInput when the trial does not finish."""
    folder = MULTIRUN / f"{datetime.now().astimezone():%Y-%m-%d/%H-%M-%S-%f}"
    command = [
        *(sys.executable, "-m", "lora_lab", *typed),
        *("train.epochs=null", "train.max_steps=null", "measure.eval_rows=0", "measure.general_rows=0"),
        *("measure.answers=0", "measure.profile_steps=0", f"measure.warmup_steps={_WARMUP_STEPS}"),
        *(f"measure.steps={steps_of(config, step_seconds)}", f"hydra.run.dir={folder}"),
    ]
    print(f"Measuring about {ROWS} rows or {SECONDS:.0f} s first.", file=sys.stderr)
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise InvalidInput(
            f"the probe ended with exit code {done.returncode}; the lines above say why. Its folder is {folder}. "
            "Leave --probe out for a forecast without it."
        )
    return folder.absolute()


def steps_of(config: TrialConfig, step_seconds: float) -> int:
    """Return how many steps are measured: those of ROWS rows, or what SECONDS hold where that is less."""
    rows = math.ceil(ROWS / config.batch_size / config.grad_accum_steps)
    held = int(SECONDS / step_seconds) - _WARMUP_STEPS
    return max(_FEWEST_STEPS, min(rows, held))
