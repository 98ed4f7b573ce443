"""Show the result of a trial when it is over."""

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_lab.outcome import End, Outcome
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.metrics import Metric, metric

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


def show_result(end: End, summary: Summary, stand_ins: list[str], places: list[str]) -> None:
    """Print the table at the end of a trial to standard output."""
    console = Console(file=sys.stdout)
    colour = "green" if end.outcome is Outcome.finished else "red"
    table = Table(title=f"[{colour}]{end.outcome.value}[/{colour}]", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    if end.reason:
        table.add_row("why", escape(end.reason))
    with_card = "vram/peak_device_gib" in summary.metrics
    for each in _SHOWN:
        if each.key in _ON_A_CARD and not with_card:
            continue
        if each.key in summary.metrics:
            table.add_row(each.title, f"{_with_error(summary, each)} {each.unit}{_remark(summary, each.key)}")
        elif each.key in summary.absent and each.key not in _UNMISSED:
            table.add_row(each.title, f"[dim]absent: {escape(summary.absent[each.key])}[/dim]")
    if summary.tags.get("validity") in ("invalid", "doubtful"):
        table.add_row(summary.tags["validity"], f"[yellow]{escape(summary.tags['validity_reasons'])}[/yellow]")
    for stand_in in stand_ins:
        table.add_row("stand-in", f"[yellow]{escape(stand_in)}[/yellow]")
    for warning in summary.warnings:
        table.add_row("warning", f"[yellow]{escape(warning)}[/yellow]")
    console.print(table)
    for place in places:
        console.print(f"  {place}", highlight=False, markup=False, soft_wrap=True)


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
