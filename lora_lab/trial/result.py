"""Show the result of a trial when it is over."""

import contextlib
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_lab.base_weights import ADAPTER, WEIGHTS, BaseWeights, trained_in
from lora_lab.outcome import End, Outcome
from lora_lab.reading import Damaged, whole
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.metrics import Metric, metric
from lora_lab.trial.quality_rows import quality_rows

_WHERE_COMPILED = "engine/compile_seconds"
"""Shown only where something was compiled; most trials compile nothing."""

_SHOWN = tuple(
    metric(key)
    for key in (
        *("throughput/tokens_per_second", "throughput/seconds_per_10k_tokens", "throughput/step_seconds_p50"),
        *(_WHERE_COMPILED, "throughput/gpu_busy_share", "flops/mfu"),
        *("vram/peak_allocated_gib", "vram/peak_device_gib"),
        *("energy/joules_per_token", "energy/net_joules_per_token", "loss/eval_before", "loss/eval"),
    )
)
_ON_A_CARD = ("throughput/gpu_busy_share", "flops/mfu")
"""Shown only for trials on a card."""

_UNMISSED = (_WHERE_COMPILED, "throughput/seconds_per_10k_tokens", "energy/net_joules_per_token")
"""Absence of these is not shown: its reason is on the line before, or is not worth a line."""


_OF_A_JOB = tuple(metric(key) for key in ("job/hours", "job/kwh", "job/cost"))
"""What a whole training took: it leads the table of a job."""


def show_result(end: End, summary: Summary, stand_ins: list[str], places: list[str], folder: Path) -> None:
    """Print the table at the end of a trial to standard output, and where everything is.

    Args:
        folder: the trial's.
    """
    console = Console(file=sys.stdout)
    colour = "green" if end.outcome is Outcome.finished else "red"
    table = Table(title=f"[{colour}]{end.outcome.value}[/{colour}]", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    if end.reason:
        table.add_row("why", escape(end.reason))
    is_job = _OF_A_JOB[0].key in summary.metrics
    if is_job:
        _add_job(table, summary)
    with_card = "vram/peak_device_gib" in summary.metrics
    for each in _SHOWN:
        if (each.key in _ON_A_CARD and not with_card) or (is_job and each.key in _IN_HEAD):
            continue
        if each.key in summary.metrics:
            table.add_row(each.title, f"{_with_error(summary, each)} {each.unit}{_remark(summary, each.key)}")
        elif each.key in summary.absent and each.key not in _UNMISSED:
            table.add_row(each.title, f"[dim]absent: {escape(summary.absent[each.key])}[/dim]")
    for title, text in quality_rows(summary):
        table.add_row(title, text)
    if summary.tags.get("validity") in ("invalid", "doubtful"):
        table.add_row(summary.tags["validity"], f"[yellow]{escape(summary.tags['validity_reasons'])}[/yellow]")
    for stand_in in stand_ins:
        table.add_row("stand-in", f"[yellow]{escape(stand_in)}[/yellow]")
    for warning in summary.warnings:
        table.add_row("warning", f"[yellow]{escape(warning)}[/yellow]")
    console.print(table)
    for place in [*places, *(_trained(folder) if is_job else [])]:
        console.print(f"  {place}", highlight=False, markup=False, soft_wrap=True)


_BEFORE, _AFTER, _BEST = "loss/eval_before", "loss/eval", "job/best_heldout_loss"
_IN_HEAD = (_BEFORE, _AFTER)
"""A job shows these together, first of all."""


def _add_job(table: Table, summary: Summary) -> None:
    """Add what a user asks of a job first: what it has brought, and what it has cost."""
    form, losses = metric(_AFTER), []
    for key, when in ((_BEFORE, "before"), (_AFTER, "after")):
        if key in summary.metrics:
            losses.append(f"{form.form.format(summary.metrics[key])} {when}")
    if _BEST in summary.metrics:
        step = f" after step {summary.metrics['job/best_step']:,.0f}" if "job/best_step" in summary.metrics else ""
        losses.append(f"lowest {form.form.format(summary.metrics[_BEST])}{step}")
    why = summary.absent.get(_AFTER, "no held-out rows were evaluated")
    table.add_row(form.title, f"{', '.join(losses)} ({form.unit})" if losses else f"[dim]absent: {escape(why)}[/dim]")
    for each in _OF_A_JOB:
        if each.key in summary.metrics:
            table.add_row(each.title, f"{_with_error(summary, each)} {each.unit}")
        elif each.key in summary.absent:
            table.add_row(each.title, f"[dim]absent: {escape(summary.absent[each.key])}[/dim]")


def _trained(folder: Path) -> list[str]:
    """Return lines that say where what was trained is and how to use it; none where there is nothing."""
    trained = trained_in(folder)
    if trained is None:
        return []
    weights = None
    with contextlib.suppress(Damaged):
        weights = whole(BaseWeights, folder / WEIGHTS)
    relation = "for" if trained.name == ADAPTER else "of"
    named = f" {relation} {weights.named()}" if weights is not None else ""
    command = weights.command(folder) if weights is not None else ""
    ways = [f"ask it something: lora-lab generate {shlex.quote(str(folder))}", f"load it without lora_lab: {command}"]
    return [f"{trained.name} {trained}{named}", *(ways if command else [])]


def _with_error(summary: Summary, shown: Metric) -> str:
    error = summary.metrics.get(f"{shown.key}_error")
    text = shown.form.format(summary.metrics[shown.key])
    return text if error is None else f"{text} ± {shown.form.format(error)}"


def _remark(summary: Summary, name: str) -> str:
    if name == "throughput/gpu_busy_share":
        return f": {summary.tags['regime']}"
    if name == _WHERE_COMPILED:
        lengths = int(summary.metrics["engine/shapes"])
        return f" for {lengths} row length{'' if lengths == 1 else 's'}"
    if name == "energy/joules_per_token" and summary.tags["energy_source"] != "counter":
        return f", by {summary.tags['energy_source'].replace('_', ' ')}"
    return ""
