"""The contenders of a sweep by halving as a table and notes, the same in a terminal and on the page."""

from rich.markup import escape
from rich.table import Table

from lora_lab.report.answers.contenders import Contender, Contenders
from lora_lab.report.measures import LOSS
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.writing.labels import count

_SPENT = {"hours": "in equal hours", "kwh": "for equal energy"}


def title(found: Contenders) -> str:
    """Return the table's title."""
    return f"each at its best {found.best_of}: held-out loss in nats per token (95 % interval over repeats), and cost"


def heads(found: Contenders) -> list[str]:
    """Return the table's heads."""
    costs = [f"{measure.unit}" for measure in found.shown]
    return [
        *("contender", found.best_of, "held-out loss", "over the lowest"),
        *(_SPENT[measure.name] for measure in found.equal),
        *costs,
        "repeats",
    ]


def cells(found: Contenders) -> list[list[str]]:
    """Return the table's rows, the lowest loss first."""
    return [_row(each, found) for each in found.contenders]


def notes(found: Contenders) -> list[str]:
    """Return what a reader must know of the table."""
    said = []
    if not found.is_over:
        return ["No contender has been through the last rung yet; resume=true runs the rest. Below are earlier rungs."]
    if found.why_no_loss:
        said.append(f"No held-out loss: {found.why_no_loss}.")
    for each in found.contenders:
        if each.edge:
            said.append(f"{each.name}: {each.value} is the {each.edge} that was tried; a better one may lie beyond.")
        if not each.value:
            said.append(f"{each.name}: no {found.best_of} came into the last rung.")
    if found.uneven_tokens is not None:
        least, most = found.uneven_tokens
        said.append(f"Not at equal tokens: contenders trained on {least:,.0f} to {most:,.0f}.")
    else:
        said.append("At equal tokens: every contender trained on as many.")
    if found.equal:
        spent = " and ".join(_SPENT[measure.name] for measure in found.equal)
        said.append(
            f"{spent[:1].upper()}{spent[1:]}: the loss that each had when it had used as much as the cheapest in all, "
            "read between two evaluations of its own curve."
        )
    if not found.why_no_loss:
        reasons: dict[str, list[str]] = {}
        for name, why in found.why_not_equal.items():
            reasons.setdefault(why, []).append(_SPENT[name])
        said += [f"Not compared {' and '.join(names)}: {why}." for why, names in reasons.items()]
    stopped = sum(len(each.stopped) for each in found.contenders)
    if stopped:
        said.append(f"{count(stopped, 'value')} of {found.best_of} stopped in an earlier rung.")
    return said


def stopped_lines(found: Contenders) -> list[str]:
    """Return a line for each value that stopped early, and why."""
    return [
        f"{each.name} {one.value} stopped after rung {one.rung}: {one.why}"
        for each in found.contenders
        for one in each.stopped
    ]


def contenders_table(found: Contenders) -> Table:
    """Return the table for a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title=title(found), title_justify="left")
    for head in heads(found):
        table.add_column(head, overflow="fold")
    for row in cells(found):
        table.add_row(*map(escape, row))
    return table


def _row(each: Contender, found: Contenders) -> list[str]:
    is_lowest = each is found.contenders[0] and each.loss is not None
    return [
        each.name,
        each.value.partition("=")[2] or "-",
        _loss(each.loss),
        "lowest" if is_lowest else _over(each.over_lowest),
        *(_loss(each.for_equal.get(measure.name)) for measure in found.equal),
        *(
            measure.form.format(each.costs[measure.name]) if measure.name in each.costs else "-"
            for measure in found.shown
        ),
        str(each.repeats),
    ]


def _loss(loss: Estimate | None) -> str:
    if loss is None:
        return "-"
    return LOSS.form.format(loss.value) + _ends(loss, LOSS.form)


def _over(change: Estimate | None) -> str:
    if change is None:
        return "-"
    seen = ", no difference seen" if change.seen is False else ""
    return f"{change.value:+.4f}{_ends(change, '{:+.4f}')}{seen}"


def _ends(of: Estimate, form: str) -> str:
    return "" if of.low is None or of.high is None else f" ({form.format(of.low)} to {form.format(of.high)})"
