"""Check the points of a sweep in a worker, which has the tokenizer and the models' shapes, before any of them runs."""

import sys
from dataclasses import replace

from lora_lab.config import InvalidInput
from lora_lab.options import Isolation
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.sweep.cluster.node import Node
from lora_lab.sweep.display import progress
from lora_lab.sweep.forecasting import rates_known
from lora_lab.sweep.plan import GridPoint
from lora_lab.sweep.points import conditions_here, raise_faults
from lora_lab.trial import worker_process
from lora_lab.work import Workload

CHECK_LOG = "check.log"


def check_new(points: list[GridPoint], folder: SweepFolder, node: Node | None = None) -> dict[str, Workload]:
    """Check the points of a new sweep, and note the conditions that they run under. Returns what `check_points` does.

    Raises: InvalidInput."""
    if folder.exists:
        raise InvalidInput(
            f"{folder.path} already holds a sweep. Add resume=true to continue it, or name another folder."
        )
    works = check_points(folder, points)
    # only now: the check may have fetched a hub model's description, and with it its commit
    points[:] = [replace(point, conditions=conditions_here(point.config, node)) for point in points]
    return works


def check_points(folder: SweepFolder, points: list[GridPoint]) -> dict[str, Workload]:
    """Check what only the tokenizer, the model's shapes and the rows show.

    Returns: the work of the points whose time can be forecast by the card's rates, by their digests.

    Raises: InvalidInput."""
    chosen = [point for point in points if point.config.isolation is Isolation.process]
    if not chosen:
        return {}
    works = any(rates_known(point.config) for point in chosen)
    with progress("checking rows and models of the points", len(chosen)) as seen:
        configs = [point.config for point in chosen]
        looks, untold = worker_process.check_trials(configs, folder.path / CHECK_LOG, seen, works)
    if untold:
        print(f"warning: {untold}; each trial checks its own point when it starts", file=sys.stderr, flush=True)
    faults: dict[str, list[str]] = {}
    for point, look in zip(chosen, looks, strict=True):
        for fault in look.faults:
            faults.setdefault(fault, []).append(" ".join(point.overrides))
    raise_faults(faults, len(points))
    return {point.digest: look.work for point, look in zip(chosen, looks, strict=True) if look.work is not None}
