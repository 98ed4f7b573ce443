"""What docs/answers holds, from the stored records alone: the reports of the H100 factorial, of the engines and of
sweep=methods as pages and as a terminal shows them, and the picture that README begins with.

    python -m benchmarks.answers [DOCS]
"""

import functools
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.console import Console

from lora_lab import __version__
from lora_lab.report.answers.claims.study import Study
from lora_lab.report.answers.claims.study_file import shipped
from lora_lab.report.findings import Findings, Question, find
from lora_lab.report.measures import THROUGHPUT
from lora_lab.report.statistics.contrasts import Contrast
from lora_lab.report.statistics.estimates import percent
from lora_lab.report.writing.numbers import change, interval
from lora_lab.report.writing.page.page import write_page
from lora_lab.report.writing.terminal import show_full
from lora_lab.store.packed_runs import PackedRuns
from lora_lab.store.stored_runs import StoredRuns

RESULTS = Path(__file__).parent / "results"
BASELINE = {"optimizer": "adamw", "precision": "fp16"}
CLAIMED = (("optimizer", "paged_adamw", "adamw", "1", "2"), ("precision", "bf16", "fp16", "2", "3"))
"""Factor, level, baseline, and the study's runs between which it changed, with others."""
_WIDE = 140
"""Columns of the stored terminal report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A line of the picture: a heading, or a change as a log ratio."""

    text: str
    value: float | None = None
    contrast: Contrast | None = None
    """What was measured here; None for the paper's own."""


_INK, _GREY, _PAPER, _HERE = "#1b2530", "#5b6670", "#b35900", "#0072b2"


def main() -> None:
    docs = Path(sys.argv[1] if len(sys.argv) > 1 else "docs") / "answers"
    docs.mkdir(parents=True, exist_ok=True)
    [study] = shipped()
    factorial = _report("h100/factorial", BASELINE, study, docs / "report")
    (docs / "answer.svg").write_text(picture(factorial, study), encoding="utf-8")
    _report("h100/engines", BASELINE | {"engine": "eager"}, study, docs / "engines")
    _report("h200/methods", None, study, docs / "methods")


def _report(records: str, baseline: dict[str, str] | None, study: Study, out: Path) -> Findings:
    """Write OUT.html and OUT.txt about a file of records."""
    store = StoredRuns(PackedRuns(RESULTS / f"{records}.jsonl.gz"))
    findings = findings_of(store, baseline, study)
    timelines = {trial.run_id: store.series(trial.run_id) for trial in store.runs()[0]}
    write_page(findings, timelines, out.with_suffix(".html"))
    with out.with_suffix(".txt").open("w", encoding="utf-8") as file:
        show_full(findings, Console(file=file, width=_WIDE))
    return findings


def findings_of(store: StoredRuns, baseline: dict[str, str] | None, study: Study) -> Findings:
    """Return what a file of records shows."""
    trials, sweeps = store.runs()
    question = Question(baseline=baseline, studies=(study,), command="python -m benchmarks.answers")
    return find(trials, sweeps, question, __version__, {trial.run_id: store.series(trial.run_id) for trial in trials})


@functools.cache
def factorial() -> tuple[Findings, Study]:
    """Return what the H100 factorial shows, and the study whose claims it tests."""
    [study] = shipped()
    return findings_of(StoredRuns(PackedRuns(RESULTS / "h100/factorial.jsonl.gz")), BASELINE, study), study


def picture(findings: Findings, study: Study) -> str:
    """Return the drawing as SVG: the same bytes every time; text as paths, for any viewer."""
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "answer"}):
        drawing(findings, study).savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def drawing(findings: Findings, study: Study) -> Figure:
    """Draw the study's ratios next to what the same change made here with all else equal."""
    rows: list[_Row] = []
    for factor, of, over, start, end in CLAIMED:
        first, second = (study.run(name).settings for name in (start, end))
        besides = [key for key in first if key != factor and first[key] != second[key]]
        ratio = math.log(_figure(study, end) / _figure(study, start))
        rows.append(_Row(text=f"{of} instead of {over}"))
        rows.append(_Row(text=f"the study ({' and '.join(besides)} too)", value=ratio))
        rows += [
            _Row(
                text=f"here, only this changed ({'AB'[machine]}, {each.regime})",
                value=each.estimate.value,
                contrast=each,
            )
            for machine, found in enumerate(findings.groups)
            for each in found.contrasts
            if (each.factor, each.of, each.measure) == (factor, of, THROUGHPUT) and each.regime != "mixed"
        ]
    figure = Figure(figsize=(9.8, 0.36 * len(rows) + 0.9))
    FigureCanvasSVG(figure)
    _draw(figure.add_axes((0.02, 0.15, 0.96, 0.75)), rows)
    figure.text(0.02, 0.94, "Change in tokens/s, with 95 % intervals", color=_GREY, fontsize=10)
    return figure


def _figure(study: Study, run: str) -> float:
    low, high = study.run(run).figures[THROUGHPUT.name]
    return (low + high) / 2


def _draw(axes: Any, rows: Sequence[_Row]) -> None:
    for place, row in enumerate(rows):
        y = len(rows) - place
        weight = "normal" if row.value is not None else "bold"
        axes.text(-152, y, row.text, va="center", fontsize=10, color=_INK, weight=weight)
        if row.value is None:
            continue
        if row.contrast is None:
            axes.plot([percent(row.value)], [y], "D", color=_PAPER, ms=7)
            axes.text(38, y, f"{percent(row.value):+.1f} %", va="center", fontsize=10, color=_PAPER)
            continue
        found = row.contrast.estimate
        if found.low is not None and found.high is not None:
            axes.plot([percent(found.low), percent(found.high)], [y, y], color=_HERE, lw=2.4)
        axes.plot([percent(row.value)], [y], "o", color=_HERE, ms=7)
        said = "no difference seen" if found.seen is False else change(found.value, row.contrast.measure)
        said += f" ({interval(found, row.contrast.measure)})"
        axes.text(38, y, said, va="center", fontsize=10, color=_HERE)
    axes.axvline(0, color=_INK, lw=0.8)
    axes.set_xlim(-152, 135)
    axes.set_ylim(0.4, len(rows) + 0.6)
    axes.set_xticks([-40, -20, 0, 20], ["-40 %", "-20 %", "0", "+20 %"], fontsize=8.5, color=_GREY)
    axes.set_yticks([])
    axes.grid(axis="x", color="#dde2e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    main()
