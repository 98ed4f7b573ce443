"""Go on with a sweep: find it, and say what of it is still to be run."""

import sys

from lora_lab.config import AUTO
from lora_lab.store.environment import environment
from lora_lab.store.sweep_folder import SKIPPED, Attempt, Planned, SweepFolder
from lora_lab.sweep.fitting import Judged
from lora_lab.sweep.plan import GridPoint, done_elsewhere, take_up


def earlier(
    points: list[GridPoint], trials: list[Planned], memory: Judged, new: SweepFolder
) -> tuple[SweepFolder, list[Planned]] | None:
    """Find the sweep to resume and its trials. None, which is reported, when there is none.

    Args:
        trials: those that this command begins with.
        new: the folder that was asked for."""
    compares = points[0].config.repeats == AUTO
    found = take_up(trials, new.path, compares)
    if found is not None:
        memory.know(trial.point for trial in found[1] if found[0].has_measured(trial))
        found = take_up(memory.once(trials), found[0].path, compares)
    if found is not None:
        print(f"resuming the sweep in {found[0].path}")
        for line in found[0].damaged(found[1]):
            print(f"warning: {line}")
        _warn_of_other_figures(found[0])
        return found
    print("no earlier sweep has these points under the present conditions: starting a new one")
    for line in done_elsewhere(points):
        print(line)
    return None


def pending_of(folder: SweepFolder, trials: list[Planned], memory: Judged) -> list[Planned]:
    """Return the trials that are still to be run, and first those that are to be recorded as skipped."""

    def is_over(trial: Planned, attempt: Attempt | None) -> bool:
        skipped = trial.point in memory.too_large
        return attempt is not None and (attempt.done or (skipped and attempt.outcome == SKIPPED))

    pending = [trial for trial, seen in zip(trials, folder.attempts(trials), strict=True) if not is_over(trial, seen)]
    return sorted(pending, key=lambda trial: trial.point not in memory.too_large)


def _warn_of_other_figures(folder: SweepFolder) -> None:
    """Warn when the code that calculates figures has changed since the sweep began. What was measured is still the
    same."""
    then, now = folder.read().record.tags.get("code.telemetry"), environment()["code.telemetry"]
    if then not in (None, now):
        print(
            f"warning: the code that calculates figures (lora_lab/telemetry) has changed since this sweep began "
            f"({then} -> {now}). `python -m lora_lab.recompute FOLDER` shows the new figures of an earlier trial.",
            file=sys.stderr,
        )
