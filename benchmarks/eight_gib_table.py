"""docs/paper.md's table of what fits into an emulated 8 GiB, from every stored trial under that limit."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.answers import factorial
from benchmarks.reports import date, markdown, stored, where

RAISED = {"True": "yes", "False": "no"}


@dataclass(slots=True)
class _Row:
    outcomes: list[str] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)


def eight_gib() -> str:
    """Return the table: a row for each shape, whatever optimizer and precision."""
    rows: dict[tuple[int, int, str], _Row] = {}
    for key, outcome, peak, before, asked in (*_factorial(), *_presets()):
        row = rows.setdefault(key, _Row())
        row.outcomes.append(outcome)
        if outcome == "finished":
            row.peaks.append(peak - before)
        elif asked:
            row.asked.append(asked)
    lines = [
        [
            f"{batch}x{length}",
            RAISED[raised],
            str(row.outcomes.count("finished")),
            str(row.outcomes.count("out_of_memory")),
            f"{max(row.peaks):.2f}" if row.peaks else "-",
            f"{min(row.asked):.2f}" if row.asked else "-",
        ]
        for (batch, length, raised), row in sorted(rows.items())
    ]
    head = [
        "batch x length",
        "raised to fp32",
        "finished",
        "out of memory",
        "used of the card at most, GiB",
        "failed asking for, GiB",
    ]
    machines, _ = factorial()
    first = machines.groups[0].group.trials[0]
    days = f"{first.place.device} (machines A and B), {date(first.started_ms)}, commit {first.tags['commit'][:7]}"
    made = [where(stored(f"h100/{name}")["origin"]) for name in ("paper_8gib", "paper_factorial_8gib")]
    return f"{markdown(head, lines)}\n\nMeasured on {'; '.join(dict.fromkeys((days, *made)))}."


_FIGURES = ("vram/peak_device_gib", "card/used_before_gib", "out_of_memory/asked_gib")
_Found = tuple[tuple[int, int, str], str, float, float, float]
"""Shape and whether weights were raised, outcome, and the figures, 0 where there is none."""


def _factorial() -> Iterator[_Found]:
    """Yield the factorial's trials under the limit."""
    findings, _ = factorial()
    for found in findings.groups:
        for trial in found.group.trials:
            params, metrics = trial.params, trial.metrics
            if params["vram_limit_gib"] == "8.0":
                key = (int(params["batch_size"]), int(params["seq_len"]), params["method.raise_to_fp32"])
                yield key, trial.outcome, *(metrics.get(name, 0.0) for name in _FIGURES)


def _presets() -> Iterator[_Found]:
    """Yield the trials of sweep=paper and sweep=paper_factorial, which raise unless they say otherwise."""
    for name in ("paper_8gib", "paper_factorial_8gib"):
        for trial in stored(f"h100/{name}")["trials"]:
            settings = dict(word.split("=", 1) for word in trial["trial"].split())
            raised = settings.get("method.raise_to_fp32", "true").capitalize()
            key = (int(settings["batch_size"]), int(settings["seq_len"]), raised)
            yield key, trial["outcome"], *(float(trial[each] or 0) for each in _FIGURES)
