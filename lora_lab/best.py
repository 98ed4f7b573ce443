"""Choose the best of the measured configurations: python -m lora_lab.best --vram 8 --objective energy

Where your own trials do not answer, the records that come with lora_lab do. Exit code 0 with an answer, 1 when no
measured configuration fits, 2 when the measurements cannot answer the question."""

import argparse
import re
import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from lora_lab.config import InvalidInput
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.output import never_end_for_output
from lora_lab.report.answers.best.another_card import choose_for_another_card
from lora_lab.report.answers.best.candidates import Wish
from lora_lab.report.answers.best.choice import Choice, choose
from lora_lab.report.answers.best.display import show_choice, show_context
from lora_lab.report.arguments import share
from lora_lab.report.measures import HOURS, KWH, OBJECTIVES, OF_JOBS
from lora_lab.report.statistics.kinds import Kind
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.packed_runs import SHIPPED, PackedRuns
from lora_lab.store.stored_runs import STORE_HELP, StoredRuns, open_store
from lora_lab.store.trials import Trial

EXIT_NOTHING_FITS = 1

_BY_NAME = {measure.name: measure for measure in (*OBJECTIVES, HOURS, KWH)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    never_end_for_output()
    parser = _parser()
    asked = parser.parse_args(arguments)
    objective = _BY_NAME[asked.objective]
    of_jobs = asked.hours is not None or objective in OF_JOBS
    if of_jobs and asked.kind == Kind.window.value:
        parser.error(
            "--kind window does not go together with --hours and the objectives hours and kwh: only jobs have these"
        )
    wish = Wish(
        objective=objective,
        kind=Kind.job if of_jobs else Kind(asked.kind) if asked.kind else None,
        hours=asked.hours,
        vram_gib=asked.vram,
        max_loss_increase=asked.max_loss_increase,
        model=asked.model,
        card=asked.card,
    )
    console = Console()
    try:
        choice, note = (_of_shipped(wish), "") if asked.shipped else _of_own(asked, wish)
    except (InvalidInput, TrackingFailed) as refusal:
        print(refusal, file=sys.stderr)
        return EXIT_REFUSED
    show_context(choice, console)
    if note:
        print(note, file=sys.stderr)
    show_choice(choice, console)
    if choice.best is None and not choice.another_card and choice.subject.kind is Kind.window:
        console.print("\nThe records that come with lora_lab may have more: add --shipped.", highlight=False)
    return EXIT_NOTHING_FITS if choice.best is None else 0


def _of_own(asked: argparse.Namespace, wish: Wish) -> tuple[Choice, str]:
    """Choose among the own trials. Where they cannot answer, choose among the shipped ones and say why, unless the
    user named a store or a sweep.

    Raises: InvalidInput, TrackingFailed."""
    trials: Sequence[Trial] = ()
    try:
        store = open_store(asked.store)
        trials, _ = store.of(asked.sweep) if asked.sweep else store.runs()
        return choose(trials, wish), ""
    except InvalidInput as refusal:
        if asked.store or asked.sweep:
            raise
        own = refusal
    try:
        choice = _of_shipped(wish)
    except InvalidInput as shipped:
        raise InvalidInput(f"{own}\nThe records that come with lora_lab do not answer either: {shipped}") from None
    return choice, f"Your own trials do not answer this: {own}" if trials else "You have no trials of your own here."


def _of_shipped(wish: Wish) -> Choice:
    """Choose among the records that come with lora_lab.

    Raises: InvalidInput when they cannot answer."""
    trials, _ = StoredRuns(PackedRuns(SHIPPED)).runs()
    return choose_for_another_card(trials, wish)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_lab.best", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--objective",
        choices=list(_BY_NAME),
        default="throughput",
        help="the measure to optimise (default: %(default)s)",
    )
    parser.add_argument(
        "--kind",
        choices=[kind.value for kind in Kind],
        help="whole trainings or measured windows, which are never compared (default: the newest trial's)",
    )
    parser.add_argument("--hours", metavar="H", type=_hours, help="the most hours that the whole job may take")
    parser.add_argument("--vram", metavar="GIB", type=_gib, help="the most card memory that it may use, in GiB")
    parser.add_argument(
        "--max-loss-increase",
        metavar="SHARE",
        type=share,
        help="how far its held-out loss may be above the lowest: 1%% or 0.01",
    )
    parser.add_argument("--model", metavar="NAME", help="name of the model (default: the newest trial's)")
    parser.add_argument("--card", metavar="NAME", help="the card: a part of its name, or the beginning of its UUID")
    parser.add_argument(
        "--sweep", metavar="ID", nargs="+", action="extend", help="only these sweeps or trials (ids in the store)"
    )
    parser.add_argument(
        "--shipped",
        action="store_true",
        help="answer from the records that come with lora_lab, measured on an H100 (default: only where own trials "
        "do not answer)",
    )
    parser.add_argument("--store", metavar="URI", help=STORE_HELP)
    return parser


def _hours(text: str) -> float:
    """Read a number of hours. Raise ArgumentTypeError, because argparse replaces the text of a ValueError."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*h?", text, re.IGNORECASE)
    if number is None or float(number[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of hours. Give a number such as 10 or 0.5")
    return float(number[1])


def _gib(text: str) -> float:
    """Read a memory size. Raise ArgumentTypeError, because argparse replaces the text of a ValueError."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GiB)?", text, re.IGNORECASE)
    if number is None or float(number[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size in GiB. Give a number such as 8 or 7.5")
    return float(number[1])


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # rich would exit with 1, which means that nothing fits
    sys.exit(main())
