"""Check the points of a sweep in a worker, which has the tokenizer and the models' shapes, before any of them runs."""

import sys
from dataclasses import replace

from lora_lab.config import InvalidInput
from lora_lab.options import Isolation
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.sweep.display import progress
from lora_lab.sweep.plan import GridPoint
from lora_lab.sweep.points import conditions_here, raise_faults
from lora_lab.trial import worker_process

CHECK_LOG = "check.log"


def check_new(points: list[GridPoint], folder: SweepFolder) -> None:
    """Check the points of a new sweep, and note the conditions that they run under."""
    if folder.exists:
        raise InvalidInput(
            f"{folder.path} already holds a sweep. Add resume=true to continue it, or name another folder."
        )
    check_points(folder, points)
    # only now: the check may have fetched a hub model's description, and with it its commit
    points[:] = [replace(point, conditions=conditions_here(point.config)) for point in points]


def check_points(folder: SweepFolder, points: list[GridPoint]) -> None:
    """Raise InvalidInput for faults that only the tokenizer, the model's shapes and the rows show."""
    chosen = [point for point in points if point.config.isolation is Isolation.process]
    if not chosen:
        return
    with progress("checking rows and models of the points", len(chosen)) as seen:
        looks, untold = worker_process.check_trials([point.config for point in chosen], folder.path / CHECK_LOG, seen)
    if untold:
        print(f"warning: {untold}; each trial checks its own point when it starts", file=sys.stderr, flush=True)
    faults: dict[str, list[str]] = {}
    for point, look in zip(chosen, looks, strict=True):
        for fault in look.faults:
            faults.setdefault(fault, []).append(" ".join(point.overrides))
    raise_faults(faults, len(points))
