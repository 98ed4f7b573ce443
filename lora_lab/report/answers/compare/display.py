"""Print a comparison of two sides on a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from lora_lab.report.answers.compare.comparison import (
    EXIT_SAME,
    EXIT_WORSE,
    NO_DIFFERENCE,
    ChangedFact,
    Result,
    SideComparison,
    exit_code,
)
from lora_lab.report.answers.compare.matched import WITHIN_RUNS
from lora_lab.report.writing.labels import count
from lora_lab.report.writing.numbers import change, detectable_text

_MOST_ROWS = 12
_LONGEST = 60


def show(comparison: SideComparison, console: Console) -> None:
    """Print cautions, results, points, outcomes, then what differs in settings and surroundings."""
    _say(console, f"{comparison.one.name}\nagainst {comparison.other.name}", bold=True)
    for caution in comparison.cautions:
        _say(console, f"Note: {caution}.")
    console.print()
    for result in comparison.results:
        _show_result(result, console)
    _show_points(comparison, console)
    _show_outcomes(comparison, console)
    _show_differences("Settings that differ", comparison.settings, console)
    _show_differences("Surroundings that differ", comparison.surroundings, console)
    console.print()
    _say(console, _verdict(comparison), bold=True)


def _verdict(comparison: SideComparison) -> str:
    code = exit_code(comparison)
    beyond = f" by more than {100 * comparison.tolerance:g} %" if comparison.tolerance else ""
    if code == EXIT_SAME:
        return f"No regression{beyond or ' beyond noise'}."
    if code == EXIT_WORSE:
        worse = [result.measure.title for result in comparison.results if result.alarms]
        worse += ["how trials end"] * any(each.worse for each in comparison.outcomes)
        return f"Worse{beyond or ' beyond noise'}: {', '.join(worse)}."
    lacking = [result.measure.title for result in comparison.results if result.lacking]
    if not lacking:
        return "Inconclusive."
    return f"No regression seen{beyond or ' beyond noise'}, but inconclusive for: {', '.join(lacking)}."


def _show_result(result: Result, console: Console) -> None:
    measure, found = result.measure, result.estimate
    _say(console, f"{measure.title}: {result.verdict}", bold=result.alarms)
    if found is None:
        text = result.basis
    elif found.low is None or found.high is None:
        text = f"{change(found.value, measure)}; {result.basis}"
    else:
        ends = f"{change(found.low, measure)} to {change(found.high, measure)}"
        share = "" if result.basis.startswith(WITHIN_RUNS) else "95 %: "  # an error of energy is a bound
        text = f"{change(found.value, measure)} ({share}{ends}), {result.basis}"
    if result.verdict == NO_DIFFERENCE and found is not None and found.detectable is not None:
        text += f"; {detectable_text(found.detectable, measure)} would have been detected (80 % power)"
    console.print(Padding(text, (0, 0, 0, 2)), highlight=False, markup=False)


def _show_points(comparison: SideComparison, console: Console) -> None:
    told = [result for result in comparison.results if result.rows]
    if not told:
        return
    title = f"\n{count(comparison.matched, 'point')} on both sides (medians, the other's first)"
    table = Table(title=escape(title), title_justify="left", title_style="", box=None, padding=(0, 2, 0, 0))
    table.add_column("point", overflow="fold")
    for result in told:
        table.add_column(result.measure.unit, justify="right", overflow="fold")
    rows: dict[str, dict[str, str]] = {row.label: {} for result in told for row in result.rows}
    for result in told:
        for row in result.rows:
            form = result.measure.form
            rows[row.label][result.measure.name] = f"{form.format(row.other)} → {form.format(row.one)}"
    for label, cells in list(rows.items())[:_MOST_ROWS]:
        table.add_row(escape(label), *(cells.get(result.measure.name, "absent") for result in told))
    console.print(table)
    if len(rows) > _MOST_ROWS:
        _say(console, f"and {len(rows) - _MOST_ROWS} more")


def _show_outcomes(comparison: SideComparison, console: Console) -> None:
    for each in comparison.outcomes:
        way = "worse" if each.worse else "better or only different"
        _say(console, f"{each.label}: {each.other} before, now {each.one} ({way})")
    for labels, where in ((comparison.only_one, "this"), (comparison.only_other, "the other")):
        if labels:
            shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
            _say(console, f"Measured in {where} only: {shown}")


def _show_differences(head: str, differences: Sequence[ChangedFact], console: Console) -> None:
    if not differences:
        _say(console, f"\n{head}: none.")
        return
    table = Table(title=f"\n{escape(head)}", title_justify="left", title_style="", box=None, padding=(0, 2, 0, 0))
    for column in ("", "this", "the other"):
        table.add_column(column, overflow="fold")
    for each in differences:
        table.add_row(*map(escape, (each.what, _short(each.one), _short(each.other))))
    console.print(table)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _say(console: Console, text: str, bold: bool = False) -> None:
    console.print(text, highlight=False, markup=False, style="bold" if bold else None)
