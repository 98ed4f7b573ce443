"""Write a table of trials: a row per point or per trial, and the columns that were asked for.

Figures are those that the report compares: trials of one place only, and none of an invalid trial or of one that ended
early. What ran out of memory keeps its own figures, where no trial of its point finished.
"""

import csv
import difflib
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lora_lab.config import InvalidInput
from lora_lab.outcome import Outcome
from lora_lab.report.answers.learnt import Learnt, learnt
from lora_lab.report.answers.quality import QualityFront, quality_fronts
from lora_lab.report.measures import ENERGY, KNOWN, LOSS, OF_JOBS, THROUGHPUT, VRAM
from lora_lab.report.statistics.kinds import groups_alike
from lora_lab.report.statistics.settings import Settings, by_point, labels
from lora_lab.store.trials import Group, Trial
from lora_lab.telemetry.metrics import METRICS, metric

FORMATS = ("md", "csv", "text")

_OWN = ("point", "n", "outcome", "place", "loss", "front")
"""Columns that are neither a metric, a setting nor a tag."""

_TAG = "tag:"
_BY_KEY = {measure.key: measure for measure in KNOWN}
_DEFAULT = (THROUGHPUT.key, VRAM.key, ENERGY.key, *(measure.key for measure in OF_JOBS), LOSS.key)

Cell = str | float | None
"""None where there is nothing to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Trials of one point at one place, or one trial."""

    point: str
    trials: tuple[Trial, ...]
    figures: tuple[Trial, ...]
    """Those whose metrics count."""
    learnt: Learnt | None = None
    """Its held-out loss against the lowest at its place."""
    front: str = ""
    """Where it stands between held-out loss and each cost."""

    def cell(self, column: str) -> Cell:
        """Return what a column shows: a median for a metric, and for the rest every value that the trials have."""
        if column == "point":
            return self.point
        if column == "n":
            return len(self.figures)
        if column == "outcome":
            return _counted([_outcome(trial) for trial in self.trials])
        if column == "place":
            return self.trials[0].place.label
        if column == "loss":
            return None if self.learnt is None else self.learnt.words
        if column == "front":
            return self.front or None
        if column.startswith(_TAG):
            return _distinct([trial.tags for trial in self.trials], column.removeprefix(_TAG))
        if any(column in trial.params for trial in self.trials):
            return _distinct([trial.params for trial in self.trials], column)
        found = [value for trial in self.figures if (value := _figure(trial, column)) is not None]
        return median(found) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns by name, and a cell for each in every row."""

    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]


def make_table(trials: Sequence[Trial], columns: Sequence[str] | None = None, each: bool = False) -> Table:
    """Make the table of these trials, points in the order of their first trial.

    Args:
        columns: names; None for point, n, outcome, and of the usual metrics those that some trial has.
        each: whether every trial has a row of its own.

    Raises: InvalidInput when a column is neither known nor in any trial."""
    rows = _rows(trials, each)
    if columns is None:
        places = {row.trials[0].place for row in rows}
        present = [key for key in _DEFAULT if any(row.cell(key) is not None for row in rows)]
        paired = ["loss"] if any(row.learnt is not None and row.learnt.over_lowest is not None for row in rows) else []
        paired += ["front"] if any(row.front for row in rows) else []
        columns = ["point", *(["place"] if len(places) > 1 else []), "n", "outcome", *present, *paired]
    else:
        _check(columns, trials)
    return Table(columns=tuple(columns), cells=tuple(tuple(row.cell(name) for name in columns) for row in rows))


def print_table(table: Table, form: str, console: Console) -> None:
    """Print it as md, csv or text. CSV has the columns' names and unrounded numbers, for programs."""
    if form == "csv":
        print(_csv(table), end="")
    elif form == "md":
        print(_markdown(table), end="")
    else:
        console.print(_text(table))


def _rows(trials: Sequence[Trial], each: bool) -> list[Row]:
    points = by_point(sorted(trials, key=lambda trial: trial.started_ms))
    names = dict(zip(points, labels(list(points)), strict=True))
    return [row for group in groups_alike(trials) for row in _rows_of_place(group, names, each)]


def _rows_of_place(group: Group, names: Mapping[Settings, str], each: bool) -> list[Row]:
    here = {trial.run_id: trial for trial in (*group.trials, *(left_out.trial for left_out in group.excluded))}
    rows = []
    for point, repeats in by_point(sorted(here.values(), key=lambda trial: trial.started_ms)).items():
        for together in [[trial] for trial in repeats] if each else [repeats]:
            measured = [trial for trial in together if trial in group.measured]
            figures = measured or [trial for trial in together if trial.outcome == Outcome.out_of_memory.value]
            rows.append(Row(point=names[point], trials=tuple(together), figures=tuple(figures)))
    finished = [[trial for trial in row.figures if trial.finished] for row in rows]
    fronts = quality_fronts(finished)
    return [
        replace(row, learnt=answer, front=_standings(fronts, at, rows))
        for at, (row, answer) in enumerate(zip(rows, learnt(finished), strict=True))
    ]


def _standings(fronts: Sequence[QualityFront], at: int, rows: Sequence[Row]) -> str:
    """Return where a row stands: "hours, energy: on the front; memory: rank=4 is better and cheaper"."""
    costs: dict[str, list[str]] = {}
    for front in fronts:
        if (standing := front.standings[at]) is not None:
            rival = "" if standing.beaten_by is None else rows[standing.beaten_by].point
            costs.setdefault(standing.says(rival), []).append(front.against)
    return "; ".join(f"{', '.join(names)}: {says}" for says, names in costs.items())


def _check(columns: Sequence[str], trials: Sequence[Trial]) -> None:
    """Check names. A tag may be absent from every trial: many are kept only where there is something to say."""
    known = {*_OWN, *METRICS}
    for trial in trials:
        known |= trial.params.keys() | trial.metrics.keys()
    for name in columns:
        if name not in known and not name.startswith(_TAG):
            near = difflib.get_close_matches(name, sorted(known), n=3)
            near += sorted({_TAG + name for trial in trials if name in trial.tags})
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise InvalidInput(
                f"--columns {name}: no trial here has such a metric or setting.{hint} "
                f"Columns are {', '.join(_OWN)}, metrics and settings by their keys, and {_TAG}NAME."
            )


def _figure(trial: Trial, key: str) -> float | None:
    if key in _BY_KEY:
        return _BY_KEY[key].of(trial)
    value = trial.metrics.get(key)
    return value if value is not None and math.isfinite(value) else None


def _outcome(trial: Trial) -> str:
    invalid = trial.finished and trial.tags.get("validity") == "invalid"
    return f"{trial.outcome} (invalid)" if invalid else trial.outcome


def _counted(words: Sequence[str]) -> str:
    """Return the only word, or each with how many there are."""
    counts = Counter(words)
    return words[0] if len(counts) == 1 else ", ".join(f"{times} {word}" for word, times in counts.items())


def _distinct(values: Sequence[Mapping[str, str]], key: str) -> str | None:
    found = dict.fromkeys(told[key] for told in values if key in told)
    return ", ".join(found) if found else None


def _heading(column: str) -> str:
    if column == "loss":
        return "loss over the lowest (95 %)"
    if column == "front":
        return "held-out loss against"
    return metric(column).column if column in METRICS else column.removeprefix(_TAG)


def _written(column: str, cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    return f"{cell}" if column in _OWN else (_BY_KEY.get(column) or metric(column)).form.format(cell)


def _is_number(table: Table, index: int) -> bool:
    return any(isinstance(row[index], int | float) for row in table.cells)


def _csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.cells)
    return out.getvalue()


def _markdown(table: Table) -> str:
    marks = ["---:" if _is_number(table, index) else "---" for index in range(len(table.columns))]
    lines = [[_heading(name) for name in table.columns], marks]
    lines += [[_written(name, cell) for name, cell in zip(table.columns, row, strict=True)] for row in table.cells]
    return "".join(f"| {' | '.join(map(_markdown_cell, line))} |\n" for line in lines)


def _markdown_cell(text: str) -> str:
    """Return a text on one line, without a bar that would end its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _text(table: Table) -> RichTable:
    shown = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(table.columns):
        shown.add_column(Text(_heading(name)), justify="right" if _is_number(table, index) else "left")
    for row in table.cells:
        shown.add_row(*(Text(_written(name, cell)) for name, cell in zip(table.columns, row, strict=True)))
    return shown
