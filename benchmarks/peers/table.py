"""From all turns to the table: medians, ranges, ratios within rounds, differences of losses. A pure function."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.plan import OTHER_KERNEL

_COLUMNS = (
    "cell",
    "contender",
    "tokens/s, median (min..max)",
    "x plain",
    "x unsloth",
    "step ms",
    "allocated GiB",
    "reserved GiB",
    "J/token",
    "kernels ms/step",
    "kernels",
    "step / kernels",
    "first step s",
    "loss off plain, nats",
)
NOTES = """\
Ranges are the least and the greatest of the rounds, of which there are too few for more. `x plain` and `x unsloth` are
ratios of tokens/s within a round. Memory is torch's own of that process in the window, the others' models not
counted. J/token is of the whole card, from NVML's energy counter, which ticks every 100 ms: windows under 2 s have
none, and a tick more or less makes the figure uncertain by the share in the JSON (`energy_resolution_percent`).
`kernels ms/step` is the time in which the card calculates or copies in one profiled step; `step / kernels` near 1 is
GPU-bound, far above 1 is waiting for the host. `first step s` counts from the call of train(), compilation and capture
with it. `loss off plain` is the largest difference of a step's training loss from plain Hugging Face's first turn, over
the first steps, all from the same adapters and rows; in plain's own row it is how far its turns differ."""

Cells = dict[str, dict[str, dict[str, Any]]]


def table(cells: Cells) -> str:
    """Markdown: a row for each contender of each cell, then what was left out and how far losses spread."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    remarks = []
    for cell, results in cells.items():
        for name, result in results.items():
            if result["outcome"] != "finished":
                when = f" in round {result['round'] + 1}" if "round" in result else ""
                remarks.append(
                    f"- {cell} {name}: {result['outcome']}{when}, {result['reason'].rstrip('.')}.{_alone(result)}"
                )
            if result["turns"] and name != OTHER_KERNEL:
                lines.append("| " + " | ".join([cell, name, *_row(name, results)]) + " |")
        remarks += [f"- {cell}: {line}" for line in _loss_remarks(results)]
    return "\n".join([*lines, "", *remarks, *([""] if remarks else []), NOTES])


def _alone(result: dict[str, Any]) -> str:
    """What a contender that ran out of memory did without the others' models on the card."""
    if "alone" not in result:
        return ""
    alone = result["alone"]
    if alone["outcome"] != "finished":
        return f" Alone on the card: {alone['outcome']}, {alone['reason']}"
    memory = f" at {alone['peak_allocated_gib']:.1f} GiB" if "peak_allocated_gib" in alone else ""
    return f" Alone on the card it ran: {alone['tokens_per_second']:,.0f} tokens/s{memory}, not paired with any other"


def _row(name: str, results: dict[str, dict[str, Any]]) -> list[str]:
    turns = results[name]["turns"]
    step = _median(turns, "step_seconds_median")
    busy = _median(turns, "kernel_seconds")
    return [
        _spread([turn["tokens_per_second"] for turn in turns], "{:,.0f}"),
        _spread(ratios(results, name, "plain"), "{:.2f}"),
        _spread(ratios(results, name, "unsloth"), "{:.2f}"),
        _form(step, "{:.1f}", 1e3),
        _form(_median(turns, "peak_allocated_gib"), "{:.2f}"),
        _form(_median(turns, "peak_reserved_gib"), "{:.2f}"),
        _spread([turn["joules_per_token"] for turn in turns if "joules_per_token" in turn], "{:.4f}"),
        _form(busy, "{:.1f}", 1e3),
        _form(_median(turns, "kernels"), "{:,.0f}"),
        _form(step / busy if step and busy else None, "{:.2f}"),
        _form(turns[0]["first_step_seconds"], "{:.1f}"),
        _form(loss_difference(results, name), "{:.1e}"),
    ]


def ratios(results: dict[str, dict[str, Any]], name: str, against: str) -> list[float]:
    """Tokens/s of `name` over those of `against`, in each round that both have."""
    other = {turn["round"]: turn for turn in results.get(against, {}).get("turns", [])}
    return [
        turn["tokens_per_second"] / other[turn["round"]]["tokens_per_second"]
        for turn in results[name]["turns"]
        if turn["round"] in other
    ]


def loss_difference(results: dict[str, dict[str, Any]], name: str) -> float | None:
    """The largest difference (nats) of a step's loss from plain's first turn; for plain, of its own later turns.

    None without both, or when the two did not train on the same rows.
    """
    reference = next(iter(results.get("plain", {}).get("turns", [])), None)
    turns = results.get(name, {}).get("turns", [])
    turns = turns[1:] if name == "plain" else turns
    if reference is None or not turns or any(turn["rows_sha256"] != reference["rows_sha256"] for turn in turns):
        return None
    first: list[float] = reference["losses"]
    return max(abs(float(a) - b) for turn in turns for a, b in zip(turn["losses"], first, strict=True))


def _loss_remarks(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    spread = loss_difference(results, OTHER_KERNEL)
    if spread is not None:
        lines.append(f"plain with another attention kernel is off plain by up to {spread:.1e} nats")
    digests = {turn["rows_sha256"] for result in results.values() for turn in result["turns"]}
    if len(digests) > 1:
        lines.append("NOT ALL CONTENDERS SAW THE SAME ROWS, so losses can't be compared")
    trained = {turn["trained"] for result in results.values() for turn in result["turns"]}
    if len(trained) > 1:
        lines.append(f"NOT ALL CONTENDERS TRAIN AS MANY NUMBERS: {', '.join(map(str, sorted(trained)))}")
    return lines


def _median(turns: Sequence[dict[str, Any]], key: str) -> float | None:
    there = [float(turn[key]) for turn in turns if key in turn]
    return statistics.median(there) if there else None


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}..{high})"


def _form(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)
