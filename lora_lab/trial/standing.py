"""Print a line for each trial of a sweep when it ends: its figures, and the sweep's progress."""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from lora_lab.outcome import End, Outcome
from lora_lab.store.record import Record
from lora_lab.store.sweep_folder import SKIPPED, Planned, SweepFolder
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.metrics import metric

FIGURES = tuple(
    metric(key)
    for key in (
        *("throughput/tokens_per_second", "vram/peak_allocated_gib", "vram/peak_device_gib"),
        *("energy/joules_per_token", "loss/eval"),
    )
)
"""The figures that are shown of each trial of a sweep."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Progress of the present start of a sweep."""

    done: int
    total: int
    seconds_left: float | None
    """None while there is nothing to estimate it from."""


def standing(folder: SweepFolder) -> Standing:
    """Return the progress of the sweep's present start. The time left is estimated from the sweep's own trials."""
    plan = folder.read()
    launched = list(zip(plan.by_folder(plan.launched), map(folder.over, plan.launched), strict=True))
    pending = [trial for trial, attempt in launched if trial is not None and attempt is None]
    attempts = zip(plan.trials, folder.attempts(plan.trials), strict=True)
    over = [(trial.point, seen) for trial, seen in attempts if seen is not None and seen.outcome != SKIPPED]
    known, unknown = estimate(pending, [(point, attempt.seconds) for point, attempt in over])
    usual = statistics.fmean([attempt.seconds for _, attempt in over]) if over else None
    open_ended = plan.rule is not None  # nobody knows how many blocks will follow
    left = None if open_ended or (unknown and usual is None) else (known + unknown * (usual or 0.0)) / plan.at_once
    return Standing(len(launched) - len(pending), len(launched), left)


def estimate(trials: Sequence[Planned], ran: Sequence[tuple[str, float]]) -> tuple[float, int]:
    """Return the seconds of those trials whose point has run before, and the number of the others.

    Args:
        ran: point and seconds of each trial that ran.
    """
    seconds: dict[str, list[float]] = {}
    for point, took in ran:
        seconds.setdefault(point, []).append(took)
    known = [statistics.median(seconds[trial.point]) for trial in trials if trial.point in seconds]
    return sum(known), len(trials) - len(known)


def show_line(folder: SweepFolder, record: Record, end: End, summary: Summary, console: Console | None = None) -> None:
    """Print one line for a trial that is over, with the sweep's progress.

    Args:
        console: where; standard output unless it is given.
    """
    now = standing(folder)
    there = [each for each in FIGURES if each.key in summary.metrics]
    figures = [f"{each.form.format(summary.metrics[each.key])} {each.column}" for each in there]
    left = "" if now.seconds_left is None or now.done == now.total else f"{clock(now.seconds_left)} left"
    why = end.reason if end.outcome is not Outcome.finished else ""
    parts = [f"[{now.done}/{now.total}] {end.outcome.value}: {record.name}", *figures, why, left]
    line = "  ".join(escape(part) for part in parts if part)
    console = console or Console(file=sys.stdout)
    console.print(f"[{colour(end.outcome.value)}]{line}[/]", highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Return a duration as text, in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def colour(outcome: str) -> str:
    """Return rich's colour for an outcome."""
    return {"finished": "green", "not run": "dim", SKIPPED: "yellow"}.get(outcome, "red")
