"""The findings as tables in a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_lab.report.answers.claims.study import Study
from lora_lab.report.answers.claims.verdict import Verdict
from lora_lab.report.answers.fits import Fit
from lora_lab.report.answers.pareto import Point
from lora_lab.report.findings import Findings, Fitted, GroupFindings
from lora_lab.report.measures import LOSS, THROUGHPUT, Measure
from lora_lab.report.statistics.attribution import Split
from lora_lab.report.statistics.factorial import FactorialModel
from lora_lab.report.statistics.step_split import StepSplit
from lora_lab.report.writing.contenders import contenders_table, stopped_lines
from lora_lab.report.writing.contenders import notes as contender_notes
from lora_lab.report.writing.effects import Row, dropped, real, real_contrasts, rows
from lora_lab.report.writing.estimates import estimate_sentences
from lora_lab.report.writing.headline import command, confounded, notes, question, sentences
from lora_lab.report.writing.labels import (
    count,
    level_text,
    levels_text,
    machine_names,
    outcome_text,
    regime_text,
    usual_levels,
)
from lora_lab.report.writing.learnt import is_compared, ordered
from lora_lab.report.writing.numbers import change, format_estimate, interval_note
from lora_lab.report.writing.sessions import pooled_table
from lora_lab.report.writing.step import split_text

_ROWS = 8
"""Lines of the small table."""
_POINTS = 6
"""Configurations that fit on one screen with the rest."""


def show(findings: Findings, console: Console) -> None:
    """Print the answer on one screen: five sentences, two small tables, and what is left out."""
    main = findings.groups[0]
    _show_headline(findings, console)
    _show_contenders(findings, console)
    if changes := rows(main, _ROWS):
        console.print(_changes_table(changes))
    if len(main.points) > 1:
        console.print(_fastest_table(main))
    for study, verdicts in findings.verdicts:
        console.print(f"\nthe claims of {escape(study.id)}:", highlight=False)
        for verdict in verdicts:
            console.print(f"  [bold]{verdict.words}[/bold]: {escape(verdict.says)}", highlight=False)
    for each in confounded(main):
        console.print(f"Cannot be separated: {escape(', '.join(each.names))}.", highlight=False)
    for note in (*notes(findings), *estimate_sentences(main)):
        console.print(escape(note), highlight=False)
    if main.group.excluded:
        console.print(f"Left out: {count(len(main.group.excluded), 'trial')}.", highlight=False)
    console.print("Everything else, with the reasons: add --full.", highlight=False)


def show_full(findings: Findings, console: Console) -> None:
    """Print everything except timelines and environment, which only the page has."""
    _show_headline(findings, console)
    _show_contenders(findings, console)
    for line in (line for each in findings.contenders for line in stopped_lines(each)):
        console.print(escape(line), highlight=False)
    for note in notes(findings):
        if note != dropped(findings.groups[0]):  # it stands below the table of contrasts
            console.print(escape(note), highlight=False)
    names = machine_names([(found.group.place, found.kind) for found in findings.groups])
    for found, name in zip(findings.groups, names, strict=True):
        _show_group(found, name, console)
    if findings.pooled:
        console.print(pooled_table(findings.pooled))
    for study, verdicts in findings.verdicts:
        _show_verdicts(study, verdicts, console)


def _show_headline(findings: Findings, console: Console) -> None:
    console.print(f"\n[bold]{escape(question(findings))}[/bold]  [dim]{escape(findings.title)}[/dim]\n")
    for answer in findings.answers:
        console.print(answer, highlight=False, markup=False)
    for sentence in sentences(findings):
        console.print(f"- {escape(sentence)}", highlight=False)
    if text := command(findings):
        console.print(f"    {text}", highlight=False, markup=False, soft_wrap=True)


def _show_contenders(findings: Findings, console: Console) -> None:
    for found in findings.contenders:
        console.print()
        if found.is_over:
            console.print(contenders_table(found))
        for note in contender_notes(found):
            console.print(escape(note), highlight=False)


def _changes_table(changes: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title=" ")
    for head in ("measure", "change", "result", "95 % interval"):
        table.add_column(head, overflow="fold")
    for row in changes:
        table.add_row(row.measure, escape(row.change), row.result, row.interval)
    return table


def _fastest_table(found: GroupFindings) -> Table:
    """Return a table of the fastest configurations."""
    table, shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title=" "), found.shown
    table.add_column("configuration", overflow="fold")
    for measure in shown:
        table.add_column(measure.unit, justify="right")
    table.add_column("outcome")
    ordered = sorted(found.points, key=lambda point: -point.figures.get(THROUGHPUT.name, (0.0,))[0])
    for point in ordered[:_POINTS]:
        figures = [m.form.format(point.figures[m.name][0]) if m.name in point.figures else "-" for m in shown]
        outcomes = ", ".join(f"{number} {outcome_text(outcome)}" for outcome, number in point.outcomes.items())
        table.add_row(escape(name_of(point.levels, found)), *figures, escape(outcomes))
    if len(ordered) > _POINTS:
        table.caption, table.caption_justify = f"and {len(ordered) - _POINTS} slower ones", "left"
    return table


def _show_group(found: GroupFindings, machine: str, console: Console) -> None:
    console.print(f"\n[bold]{escape(machine)}[/bold]")
    console.print(
        f"{found.group.place.host}; {found.group.place.versions}; code {found.group.place.code}",
        highlight=False,
        markup=False,
        style="dim",
    )
    console.print(_points_table(found))
    if is_compared(found):
        console.print(_learnt_table(found))
    for measure, why in found.absent.items():
        console.print(f"no {measure}: {escape(why)}", highlight=False)
    for each in found.design.confounded:
        names = ", ".join(each.names)
        console.print(f"[yellow]cannot be separated[/yellow]: {escape(names)} ({escape(each.why)})", highlight=False)
    for note in found.design.notes:
        console.print(f"[yellow]note[/yellow]: {escape(note)}", highlight=False)
    if real_contrasts(found):
        console.print(_contrasts_table(found))
    if gone := dropped(found):
        console.print(escape(gone), highlight=False)
    for fitted in found.models:
        _show_model(fitted, found, console)
    for split in found.splits:
        _show_split(split, found, console)
    for needed in found.needed:
        console.print(escape(needed.text), highlight=False)
    if found.fits:
        console.print(_fits_table(found.fits))
        for note in dict.fromkeys(fit.note for fit in found.fits if fit.note):
            console.print(f"[yellow]note[/yellow]: {escape(note)}", highlight=False)
    for sentence in estimate_sentences(found):
        console.print(escape(sentence), highlight=False)
    for trial in found.group.doubtful:
        reasons = trial.tags.get("validity_reasons", "no reason kept")
        console.print(f"doubtful, but used: {escape(trial.name)}: {escape(reasons)}", highlight=False)
    for excluded in found.group.excluded:
        console.print(f"left out: {escape(excluded.trial.name)}: {escape(excluded.why)}", highlight=False)


def _points_table(found: GroupFindings) -> Table:
    """Return a table with one row per point."""
    table = Table(title="every configuration: median ± half the range of its trials", title_justify="left")
    table.add_column("configuration", overflow="fold", min_width=12)
    table.add_column("outcome")
    shown, factors = found.shown, found.design.factors
    for measure in shown:
        table.add_column(measure.unit, justify="right")
    table.add_column("regime")
    for point in found.points:
        outcomes = ", ".join(f"{count} {outcome.replace('_', ' ')}" for outcome, count in point.outcomes.items())
        figures = [_figure(point, measure) for measure in shown]
        table.add_row(
            escape(name_of(point.levels, found)),
            escape(outcomes),
            *figures,
            escape(point.regime) if point.figures else "",
        )
    if usual := levels_text(usual_levels(found.points, factors), factors, {}):
        table.caption, table.caption_justify = f"unless a row says otherwise: {escape(usual)}", "left"
    return table


def _learnt_table(found: GroupFindings) -> Table:
    """Return a table of the held-out losses with what they cost, the lowest first."""
    table = Table(
        title="held-out loss, what it is over the lowest (95 % interval over rows), and what it costs",
        title_justify="left",
    )
    for head in ("configuration", "nats per token", "over the lowest", *(front.cost.unit for front in found.quality)):
        table.add_column(head, overflow="fold")
    for point, answer, costs in ordered(found):
        cells = [f"{cell.figure} {cell.says}" for cell in costs]
        table.add_row(
            escape(name_of(point.levels, found)), LOSS.form.format(answer.loss), answer.words, *map(escape, cells)
        )
    if found.quality:
        table.caption, table.caption_justify = "on the front: no trial is both better and cheaper", "left"
    return table


def name_of(levels: Mapping[str, str], found: GroupFindings) -> str:
    """Return a point's name, without what most points share."""
    usual = usual_levels(found.points, found.design.factors)
    factors = found.design.factors
    return levels_text(levels, factors, usual) or levels_text(levels, factors, {}) or "the only point"


def _figure(point: Point, measure: Measure) -> str:
    if measure.name not in point.figures:
        return "-"
    median, low, high = point.figures[measure.name]
    spread = "" if low == high else f" ±{(high - low) / 2 / abs(median):.1%}"
    return measure.form.format(median) + spread


def _contrasts_table(found: GroupFindings) -> Table:
    factors = {factor.name: factor for factor in found.compared}
    table = Table(
        title="one factor changed, all else equal (95 % intervals; a row says if one holds for its session alone)",
        title_justify="left",
    )
    for head in ("measure", "of / over", "regime", "pairs", "change"):
        table.add_column(head, overflow="fold")
    for each in real_contrasts(found):
        of, over = (level_text(factors[each.factor], level) for level in (each.of, each.over))
        besides = f" (also changed: {'; '.join(each.also_changed)})" if each.also_changed else ""
        note = interval_note(each)
        besides += f" ({note})" if note else ""
        if each.measure is THROUGHPUT and isinstance(each.split, StepSplit):
            besides += f"; {split_text(each.split)}"
        change_told = format_estimate(each.estimate, each.measure, each.lowest, each.highest) + besides
        table.add_row(
            each.measure.title,
            escape(f"{of} / {over}"),
            escape(regime_text(each.regime)),
            str(each.pairs),
            escape(change_told),
        )
    return table


def _show_model(fitted: Fitted, found: GroupFindings, console: Console) -> None:
    head = f"factorial model of {fitted.measure.title}, {regime_text(fitted.regime)}"
    head = escape(head + (f", run {fitted.sweep[:8]}" if fitted.sweep else ""))
    if not isinstance(fitted.model, FactorialModel):
        console.print(f"{head}: none ({escape(fitted.model)})", highlight=False)
        return
    model = fitted.model
    spread = change(model.residual_sd, model.measure, signed=False)
    table = Table(
        title=f"{head}: {model.trials} trials, R2 {model.r_squared:.3f}, residual SD {spread}",
        title_justify="left",
    )
    for name in ("averaged over the rest", "change"):
        table.add_column(name, overflow="fold")
    for effect in real(found, model.effects):
        table.add_row(escape(f"{effect.of} / {effect.over}"), escape(format_estimate(effect.estimate, model.measure)))
    for each in model.interactions:
        size = change(each.largest, model.measure, signed=False)
        table.add_row(
            escape(" x ".join(each.factors)), f"up to {size} away from the sum of both effects, p = {each.p:.2g}"
        )
    for name in model.not_estimable:
        table.add_row(escape(name), "not estimable: combinations are missing")
    console.print(table)


def _show_split(split: Split, found: GroupFindings, console: Console) -> None:
    start, end = (name_of(levels, found) for levels in (split.start, split.end))
    title = f"{split.measure.title}: what made the difference from {start} to {end}"
    if not split.parts:
        corners = "; ".join(name_of(levels, found) for levels in split.missing)
        console.print(f"{escape(title)}: cannot be split: no measurement at {escape(corners)}", highlight=False)
        return
    table = Table(title=escape(title), title_justify="left")
    for head in ("part", "from", "to", "change"):
        table.add_column(head, overflow="fold")
    for part in split.parts:
        if part.estimate is None:
            continue
        said = format_estimate(part.estimate, split.measure)
        table.add_row(escape(part.factor), escape(part.over), escape(part.of), escape(said))
    if split.total is not None:
        table.add_row("all together", "", "", escape(format_estimate(split.total, split.measure)))
    console.print(table)


def _fits_table(fits: Sequence[Fit]) -> Table:
    """Return a table in which budgets with the same result share a row."""
    table = Table(title="what fits (batch x seq)", title_justify="left")
    for head in ("with", "GiB", "largest that fits", "next, and what it needs"):
        table.add_column(head, overflow="fold")
    budgets: dict[tuple[str, str, str], list[str]] = {}
    for fit in sorted(fits, key=lambda fit: (fit.others, fit.budget_gib)):
        largest = "none tried fits" if fit.largest is None else fit.largest
        largest += f" ({fit.largest_gib:.2f} GiB)" if fit.largest_gib is not None else ""
        following = "none was tried" if fit.next is None else fit.next
        if fit.next_needs_gib is not None:
            following += f" ({'at least ' if fit.next_is_bound else ''}{fit.next_needs_gib:.2f} GiB)"
        following += ", but might fit with less unused cache" if fit.next_may_fit else ""
        following += f"; not known for {', '.join(fit.unknown)}" if fit.unknown else ""
        budgets.setdefault((fit.others, largest, following), []).append(f"{fit.budget_gib:g}")
    for (others, largest, following), told_budgets in budgets.items():
        table.add_row(escape(others), ", ".join(told_budgets), escape(largest), escape(following))
    return table


def _show_verdicts(study: Study, verdicts: Sequence[Verdict], console: Console) -> None:
    console.print(f"\n[bold]the claims of {escape(study.id)}[/bold]: {escape(study.title)}", highlight=False)
    console.print(f"  made on {escape(study.on)}", highlight=False)
    for verdict in verdicts:
        console.print(f"\n  “{escape(verdict.says)}”", highlight=False)
        console.print(f"  [bold]{verdict.words}[/bold]: {escape(verdict.why)}", highlight=False)
        if verdict.original:
            console.print(f"  in the original: {escape(verdict.original)}", highlight=False)
        for seen in verdict.seen:
            console.print(f"  seen here: {escape(seen.text)}", highlight=False)
        console.print(f"  to settle it there: {escape(verdict.settle)}", highlight=False, soft_wrap=True)
