"""From all turns to the tables: medians, ranges, ratios within rounds, differences of losses. Pure functions."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.plan import OTHER_KERNEL, TUTORIAL, UNSLOTH, UNSLOTH_LEAN, UNSLOTH_NO_CHECKPOINTING, UNSLOTH_TILED
from benchmarks.reports import markdown

BASELINES = ("plain", TUTORIAL, "liger", UNSLOTH, UNSLOTH_LEAN, UNSLOTH_TILED, UNSLOTH_NO_CHECKPOINTING)
_PAYS = ("plain", UNSLOTH)
"""Against which contenders a compilation has to pay."""
NOTES = """\
Tokens are real ones: padding is not counted. Ranges are the least and the greatest of the rounds. `x plain` and the
other ratios are of tokens/s within a round. `GPU work` is the time per step in which the card calculates or copies,
over the profiled steps of the last round; `idle` is the rest of the median step. `first step s` counts from the call
of train() in the first turn, compilation and capture with it; loading is not in it. `ahead after` is the step from
which a contender that starts together with the other one is ahead of it: the difference of first steps over the
difference of steps. Memory is torch's own of that process in the window, without the others' models. J/token is of
the whole card, from NVML's energy counter, which ticks every 100 ms: windows under 2 s have none. `loss off` is the
largest difference of a step's training loss from plain's first turn (in files without plain, the tutorial's), over
the first steps, all from the same adapters and rows; in its own row it is how far its turns differ."""

Results = dict[str, dict[str, Any]]
Cells = dict[str, Results]


def table(cells: Cells) -> str:
    """Return Markdown: speed, what it costs, what was left out and how far losses spread, what was built."""
    parts = [speed_table(cells), work_table(cells), cost_table(cells), _remarks(cells), NOTES, built_table(cells)]
    return "\n\n".join(filter(None, parts))


def speed_table(cells: Cells) -> str:
    """Return tokens/s and the ratios within rounds, a row for each contender of each cell."""
    against = _baselines(cells)
    head = ["cell", "contender", "rounds", "tokens/s, median (min..max)", *(f"x {name}" for name in against)]
    rows = []
    for cell, name, results in _measured(cells):
        turns = results[name]["turns"]
        paired = ["1" if other == name else _spread(ratios(results, name, other), "{:.2f}") for other in against]
        speed = _spread([turn["tokens_per_second"] for turn in turns], "{:,.0f}")
        rows.append([cell, name, str(len(turns)), speed, *paired])
    return markdown(head, rows)


def work_table(cells: Cells) -> str:
    """Return each baseline's GPU work over a contender's: what a host that is never waited for leaves of a ratio."""
    against = _baselines(cells)
    rows = []
    for cell, name, results in _measured(cells):
        work = {each: _work(results.get(each, {"turns": []})) for each in (name, *against)}
        mine = work[name]
        if name not in against and mine:
            shares = (of / mine if (of := work[other]) else None for other in against)
            rows.append([cell, name, *(_form(share, "{:.2f}") for share in shares)])
    return markdown(["cell, GPU work alone", "contender", *(f"x {name}" for name in against)], rows) if rows else ""


def _work(result: dict[str, Any]) -> float | None:
    """Return the GPU's work per step in seconds, if need be of a contender that only ran alone."""
    return median([*result["turns"], result.get("alone", {})], "kernel_seconds")


def _baselines(cells: Cells) -> list[str]:
    return [name for name in BASELINES if any(results.get(name, {}).get("turns") for results in cells.values())]


def cost_table(cells: Cells) -> str:
    """Return a step's parts, memory, energy, and after how many steps a compilation pays."""
    head = ["cell", "contender", "step ms", "GPU work ms", "idle ms", "kernels", "allocated GiB", "reserved GiB"]
    head += ["J/token", "first step s", *(f"ahead of {name} after" for name in _PAYS), "loss off, nats"]
    rows = []
    for cell, name, results in _measured(cells):
        turns = results[name]["turns"]
        step = median(turns, "step_seconds_median")
        busy = median(turns, "kernel_seconds")
        energy = [turn["joules_per_token"] for turn in turns if "joules_per_token" in turn]
        rows.append(
            [
                cell,
                name,
                _form(step, "{:.1f}", 1e3),
                _form(busy, "{:.1f}", 1e3),
                _form(step - busy if step and busy else None, "{:.1f}", 1e3),
                _form(median(turns, "kernels"), "{:,.0f}"),
                _form(median(turns, "peak_allocated_gib"), "{:.2f}"),
                _form(median(turns, "peak_reserved_gib"), "{:.2f}"),
                _spread(energy, "{:.4f}"),
                _form(turns[0]["first_step_seconds"], "{:.1f}"),
                *(ahead_after(results, name, other) for other in _PAYS),
                _form(loss_difference(results, name), "{:.1e}"),
            ]
        )
    return markdown(head, rows)


def built_table(cells: Cells) -> str:
    """Return what each contender's process read from its model; nothing for files of before."""
    rows = {}
    for results in cells.values():
        for name, result in results.items():
            if "facts" in result:
                facts = result["facts"]
                row = (name, facts["attention"], facts["adapters"], facts["embeddings"], facts["head"])
                rows[row] = list(row)
    if not rows:
        return ""
    return "What was built:\n\n" + markdown(
        ["contender", "attention", "adapters", "embeddings", "head"], [*rows.values()]
    )


def _measured(cells: Cells) -> list[tuple[str, str, Results]]:
    return [
        (cell, name, results)
        for cell, results in cells.items()
        for name, result in results.items()
        if result["turns"] and name != OTHER_KERNEL
    ]


def ratios(results: Results, name: str, against: str) -> list[float]:
    """Return tokens/s of `name` over those of `against`, in each round that both have."""
    other = {turn["round"]: turn for turn in results.get(against, {}).get("turns", [])}
    return [
        turn["tokens_per_second"] / other[turn["round"]]["tokens_per_second"]
        for turn in results[name]["turns"]
        if turn["round"] in other
    ]


def ahead_after(results: Results, name: str, against: str) -> str:
    """Return the step after which `name` is ahead of `against`, both counted from train(): `first + (n - 1) * step`."""
    mine, other = results[name]["turns"], results.get(against, {}).get("turns", [])
    if name == against or not other:
        return "-"
    later = mine[0]["first_step_seconds"] - other[0]["first_step_seconds"]
    gained = _step(other) - _step(mine)
    if later <= 0:
        return "at once" if gained >= 0 else "-"
    return f"{1 + math.ceil(later / gained):,} steps" if gained > 0 else "never"


def _step(turns: Sequence[dict[str, Any]]) -> float:
    return statistics.median(float(turn["step_seconds_median"]) for turn in turns)


def loss_difference(results: Results, name: str) -> float | None:
    """Return the largest difference (nats) of a step's loss from the reference's first turn; for the reference, of its
    own later turns.

    None without both, or when the two did not train on the same rows.
    """
    of = next((each for each in ("plain", TUTORIAL) if results.get(each, {}).get("turns")), None)
    turns = results.get(name, {}).get("turns", [])
    turns = turns[1:] if name == of else turns
    if of is None or not turns:
        return None
    reference = results[of]["turns"][0]
    if any(turn["rows_sha256"] != reference["rows_sha256"] for turn in turns):
        return None
    first: list[float] = reference["losses"]
    return max(abs(float(a) - b) for turn in turns for a, b in zip(turn["losses"], first, strict=True))


def _remarks(cells: Cells) -> str:
    lines = []
    for cell, results in cells.items():
        for name, result in results.items():
            if result["outcome"] != "finished":
                when = f" in round {result['round'] + 1}" if "round" in result else ""
                lines.append(
                    f"{cell} {name}: {result['outcome']}{when}, {result['reason'].rstrip('.')}.{_alone(result)}"
                )
        lines += [f"{cell}: {line}" for line in _loss_remarks(results)]
    return "\n".join(f"- {line}" for line in lines)


def _alone(result: dict[str, Any]) -> str:
    """Return what a contender that ran out of memory did without the others' models on the card."""
    if "alone" not in result:
        return ""
    alone = result["alone"]
    if alone["outcome"] != "finished":
        return f" Alone on the card: {alone['outcome']}, {alone['reason']}"
    memory = f" at {alone['peak_allocated_gib']:.1f} GiB" if "peak_allocated_gib" in alone else ""
    work = f", {1e3 * alone['kernel_seconds']:.1f} ms of GPU work per step" if "kernel_seconds" in alone else ""
    speed = f"{alone['tokens_per_second']:,.0f} tokens/s{memory}{work}"
    return f" Alone on the card it ran: {speed}, not paired with any other."


def _loss_remarks(results: Results) -> list[str]:
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


def median(turns: Sequence[dict[str, Any]], key: str) -> float | None:
    """Return the median of the turns that have the figure."""
    there = [float(turn[key]) for turn in turns if key in turn]
    return statistics.median(there) if there else None


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}..{high})"


def _form(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)
