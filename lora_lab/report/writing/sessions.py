"""The contrasts that several sessions have, as a table."""

from collections.abc import Sequence
from dataclasses import replace

from rich.markup import escape
from rich.table import Table

from lora_lab.report.statistics.pooling import PooledContrast
from lora_lab.report.writing.labels import regime_text
from lora_lab.report.writing.numbers import change, format_estimate, interval, is_absurd


def pooled_table(pooled: Sequence[PooledContrast]) -> Table:
    """Return a table with one row per contrast."""
    table = Table(
        title="contrasts over several sessions that ran the same settings (random effects, 95 %)", title_justify="left"
    )
    for head in ("measure", "of / over", "regime", "sessions (places)", "mean"):
        table.add_column(head, overflow="fold")
    for each in pooled:
        table.add_row(
            each.measure.title,
            escape(f"{each.of} / {each.over}"),
            escape(regime_text(each.regime)),
            f"{len(each.sessions)} ({each.places})",
            escape(pooled_text(each)),
        )
    return table


def pooled_text(found: PooledContrast) -> str:
    """Return the mean over the sessions, how much they differ, and where another one would lie."""
    made, measure = found.pooled, found.measure
    absurd = is_absurd(made.estimate, measure)
    said = ["too few sessions to tell" if absurd else format_estimate(made.estimate, measure)]
    if made.between:
        said.append(f"sessions differ by a standard deviation of {change(made.between, measure, signed=False)}")
    else:
        said.append("sessions differ no more than by noise")
    said[-1] += f" (Q = {made.q:.3g}, p = {made.p:.2g})"
    if made.prediction is None:
        said.append("too few sessions to say where another would lie")
    else:
        low, high = made.prediction
        ends = interval(replace(made.estimate, low=low, high=high), measure)
        said.append(f"another session would lie in {ends} (95 %)")
    return "; ".join(said)
