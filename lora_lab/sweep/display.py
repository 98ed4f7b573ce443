"""Show a sweep to the user: the forecast, its progress, the table at the end."""

import csv
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from lora_lab.comparison.rule import Rule
from lora_lab.store.sweep_folder import Attempt, Planned
from lora_lab.trial.standing import FIGURES, colour

_WIDE = 160

_SAY_SECONDS = 10.0
"""How often a line is printed where no live bar can be drawn."""


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of work that has `total` parts: a bar on a terminal, a line now and then elsewhere.

    Yields: a function that takes the number of parts done so far."""
    console = Console(stderr=True)
    said = time.monotonic()

    def seen(done: int) -> None:
        nonlocal said
        bar.update(task, completed=done)
        if not console.is_terminal and time.monotonic() - said > _SAY_SECONDS:
            said = time.monotonic()
            console.print(f"  {what}: {done} of {total}", highlight=False, markup=False, soft_wrap=True)

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield seen


def show_forecast(
    folder: Path, trials: Sequence[Planned], pending: Sequence[Planned], skipped: Container[str], forecast: str
) -> None:
    """Print what will run and what that takes.

    Args:
        skipped: the points that are not run.
        forecast: of what is pending and not skipped, in words.
    """
    run, left = ([trial for trial in each if trial.point not in skipped] for each in (trials, pending))
    points, repeats = len({trial.point for trial in run}), 1 + max((trial.repeat for trial in run), default=0)
    console = Console(file=sys.stdout)
    what = f"{_counted(len(run), 'trial')}: {_counted(points, 'point')}"
    what += f" x {repeats} repeats" if repeats > 1 else ""
    done = len(run) - len(left)
    console.print(what + (f", {done} of them done already" if done else ""), highlight=False)
    console.print(forecast if left else "nothing left to run", highlight=False, markup=False, soft_wrap=True)
    console.print(f"files {folder}", highlight=False, markup=False, soft_wrap=True)


def show_rule(folder: Path, rule: Rule, points: int) -> None:
    """Print what a sweep with repeats=auto compares, and when it stops."""
    looks = ", ".join(str(pairs) for pairs, _ in itertools.islice(rule.looks(), 4))
    console = Console(file=sys.stdout)
    for contrast in rule.contrasts:
        console.print(f"comparing {contrast.of} with {contrast.over}", highlight=False, markup=False)
    console.print(
        f"blocks of {points} trials, judged after {looks}, ... of them: is the change beyond noise, or within "
        f"{rule.margin_percent:g} %? Budget: {rule.budget_minutes:g} min",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(f"files {folder}", highlight=False, markup=False, soft_wrap=True)


def show_table(trials: Sequence[Planned], attempts: Sequence[Attempt | None]) -> None:
    """Print every trial with its figures, then the reason of every trial that did not finish."""
    shown = [each for each in FIGURES if any(a is not None and each.key in a.metrics for a in attempts)]
    keys = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    repeated = any(trial.repeat for trial in trials)
    table = Table()
    for key in (*keys, *(["repeat"] if repeated else [])):
        table.add_column(key.rpartition(".")[2], overflow="fold")
    table.add_column("outcome", no_wrap=True)
    for each in shown:
        table.add_column(each.column, justify="right")
    for trial, attempt in _in_order(trials, attempts):
        outcome = attempt.outcome if attempt else "not run"
        metrics = attempt.metrics if attempt else {}
        cells = [escape(trial.settings.get(key, "")) for key in keys] + ([str(trial.repeat + 1)] if repeated else [])
        cells.append(f"[{colour(outcome)}]{outcome}[/]")
        cells += [each.form.format(metrics[each.key]) if each.key in metrics else "" for each in shown]
        table.add_row(*cells)
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=_WIDE)  # a log file has no width of its own
    console.print(table)
    for trial, attempt in _in_order(trials, attempts):
        if attempt is not None and attempt.reason:
            said = f"{attempt.outcome}: {trial.name}: {attempt.reason}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
        if attempt is not None and attempt.tags.get("validity") in ("invalid", "doubtful"):
            said = f"{attempt.tags['validity']}: {trial.name}: {attempt.tags['validity_reasons']}"
            console.print(said, style="yellow", highlight=False, markup=False, soft_wrap=True)
    warned = Counter(warning for attempt in attempts if attempt for warning in set(attempt.warnings))
    for warning, count in warned.items():
        which = "all trials" if count == len(trials) else f"{count} of {len(trials)} trials"
        console.print(f"[yellow]warning[/yellow] ({which}): {escape(warning)}", highlight=False, soft_wrap=True)
    counts = Counter(attempt.outcome if attempt else "not run" for attempt in attempts)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()), highlight=False)


def write_table(path: Path, trials: Sequence[Planned], attempts: Sequence[Attempt | None]) -> None:
    """Write the same table for other programs, with one row per trial.

    Raises: OSError."""
    names = sorted({name for attempt in attempts if attempt for name in attempt.metrics})
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "repeat", "outcome", "reason", "seconds", *names])
        for trial, attempt in _in_order(trials, attempts):
            if attempt is None:
                rows.writerow([trial.label, trial.repeat, "not run"])
                continue
            figures = [attempt.metrics.get(name, "") for name in names]
            rows.writerow([trial.label, trial.repeat, attempt.outcome, attempt.reason, attempt.seconds, *figures])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _in_order(trials: Sequence[Planned], attempts: Sequence[Attempt | None]) -> list[tuple[Planned, Attempt | None]]:
    """Return the points in the order they were asked for, with the repeats of a point together."""
    first = {trial.point: trial.asked_place for trial in trials}
    return sorted(zip(trials, attempts, strict=True), key=lambda pair: (first[pair[0].point], pair[0].repeat))
