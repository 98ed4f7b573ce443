"""Report what a sweep found: python -m lora_lab.report [--sweep ID ...]

Reads runs back from MLflow, prints what they show, writes report.html and stores it with the sweep's run.
With --against, two sweeps or two trials are compared instead: exit code 1 if something got worse, 3 if that is
inconclusive.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lora_lab import __version__
from lora_lab.config import InvalidInput
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.output import never_end_for_output
from lora_lab.report.answers.claims.study_file import load_study, shipped
from lora_lab.report.answers.compare.comparison import compare, exit_code
from lora_lab.report.answers.compare.display import show as show_comparison
from lora_lab.report.arguments import names, settings, share
from lora_lab.report.findings import Findings, Question, find
from lora_lab.report.writing.page.page import Timelines, write_page
from lora_lab.report.writing.page.page_file import choose_place
from lora_lab.report.writing.table import FORMATS, make_table, print_table
from lora_lab.report.writing.terminal import show, show_full
from lora_lab.secrets import without_secrets
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.stored_runs import STORE_HELP, StoredRuns, open_store
from lora_lab.store.trials import Sweep, Trial

_WIDE = 160
"""Columns of a terminal report that goes into a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return exit code 0; with --against 1 if something got worse beyond noise, 3 if inconclusive;
    2 for invalid input."""
    never_end_for_output()
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    asked = parser.parse_args(given)
    _check_table(asked, parser)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    try:
        store = open_store(asked.store, asked.experiment)
        trials, sweeps = store.of(asked.sweep) if asked.sweep else store.last_sweep()
        if asked.table:
            print_table(make_table(trials, asked.columns, asked.each), asked.table, console)
            return 0
        if asked.against:
            comparison = compare((trials, sweeps), store.of([asked.against]), asked.tolerance)
            show_comparison(comparison, console)
            return exit_code(comparison)
        question = Question(
            baseline=asked.baseline,
            ends=tuple(asked.split) if asked.split else None,
            studies=tuple([load_study(path) for path in asked.claims] if asked.claims else shipped()),
            command=shlex.join(
                [
                    "python",
                    "-m",
                    "lora_lab.report",
                    *map(without_secrets, _that_names_its_sweeps(given, trials, sweeps)),
                ]
            ),
        )
        timelines = {trial.run_id: store.series(trial.run_id) for trial in trials}
        findings = find(trials, sweeps, question, __version__, timelines)
        path, why = choose_place(_newest(trials, sweeps).tags, asked.out)
        _write(findings, timelines, store, trials, path)
        (show_full if asked.full or asked.split else show)(findings, console)
        for study in question.studies if asked.claims else ():
            if all(study is not judged for judged, _ in findings.verdicts):
                held = " ".join(f"{key}={value}" for key, value in study.held.items())
                console.print(f"no trial here tests {study.id}: it needs {held}", highlight=False)
        _keep(path, store, trials, sweeps, console)
        if why:
            console.print(why, highlight=False, soft_wrap=True, markup=False)
    except (InvalidInput, TrackingFailed) as refusal:
        print(refusal, file=sys.stderr)
        return EXIT_REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_lab.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="ID",
        help="sweeps or trials, by their run's id or its beginning; default: the last",
    )
    parser.add_argument(
        "--baseline",
        type=settings,
        metavar="KEY=VALUE,...",
        help="baseline settings: optimizer=adamw,...",
    )
    parser.add_argument(
        "--split",
        nargs=2,
        type=settings,
        metavar=("FROM", "TO"),
        help="two points, as KEY=VALUE,..., whose difference is to be split into its factors; default: a paper's, or "
        "the baseline and the fastest",
    )
    parser.add_argument("--claims", nargs="+", type=Path, metavar="FILE", help="yaml files with a paper's claims")
    parser.add_argument("--against", metavar="ID", help="a sweep or trial to compare with; nothing else is reported")
    parser.add_argument(
        "--tolerance", type=share, default=0.0, metavar="PERCENT", help="--against: how much worse is acceptable (2%%)"
    )
    parser.add_argument("--full", action="store_true", help="print every table, not only the answer")
    parser.add_argument("--table", choices=FORMATS, help="print a table of the trials; nothing else is reported")
    parser.add_argument(
        "--columns",
        type=names,
        metavar="NAME,...",
        help="--table: point, n, outcome, place, loss, front, metrics and settings by their keys, and tag:NAME",
    )
    parser.add_argument("--each", action="store_true", help="--table: a row for each trial; default: for each point")
    parser.add_argument("--store", metavar="URI", help=STORE_HELP)
    parser.add_argument("--experiment", metavar="NAME", help="only runs of this MLflow experiment")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page; by default report.html in its sweep's folder"
    )
    return parser


def _check_table(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with a usage error where an option would go unused."""
    unused, why = ["columns", "each"], "needs --table, as in --table md"
    if asked.table:
        unused = ["baseline", "split", "claims", "against", "out", "full"]
        why = "does not go together with --table"
    for name in unused:
        if getattr(asked, name):
            parser.error(f"--{name} {why}")


def _that_names_its_sweeps(given: Sequence[str], trials: Sequence[Trial], sweeps: Sequence[Sweep]) -> list[str]:
    """Return the arguments with the last sweep named by its id, because later sweeps will follow."""
    ids = [sweep.run_id for sweep in sweeps] or [trial.run_id for trial in trials]
    return list(given) if "--sweep" in given else [*given, "--sweep", *ids]


def _write(findings: Findings, timelines: Timelines, store: StoredRuns, trials: Sequence[Trial], path: Path) -> None:
    """Write the page.

    Raises: InvalidInput when nothing can be written there."""
    try:
        write_page(findings, timelines, path, {trial.run_id: store.answers(trial) for trial in trials})
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be written ({error.strerror}). Name another file with --out FILE."
        ) from error


def _keep(path: Path, store: StoredRuns, trials: Sequence[Trial], sweeps: Sequence[Sweep], console: Console) -> None:
    """Store the page with its runs, and print where to open it."""
    console.print(f"\npage {path.resolve()}", highlight=False, soft_wrap=True, markup=False)
    newest = _newest(trials, sweeps)
    try:
        for run_id in [sweep.run_id for sweep in sweeps] or [newest.run_id]:
            store.keep(run_id, path)
        for line in store.where(newest.run_id, path.name):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    except TrackingFailed as fault:
        console.print(
            f"the page was not uploaded to the store: {fault}",
            style="yellow",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


def _newest(trials: Sequence[Trial], sweeps: Sequence[Sweep]) -> Sweep | Trial:
    return max(sweeps, key=lambda sweep: sweep.started_ms) if sweeps else trials[-1]


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # rich would leave with 1, which means that something got worse
    sys.exit(main())
