"""Say how much memory a trial will take, before any GPU is touched.

    python -m lora_lab.fit model=llama3_1_8b batch_size=2 seq_len=4096
    python -m lora_lab.fit --vram 8,12 model=llama3_1_8b batch_size=2 seq_len=4096
    python -m lora_lab.fit --vram 8 model=llama3_1_8b
    python -m lora_lab.fit --vram 8,12,16,24 --table context model=llama3_1_8b method.rank=32

It takes the settings of a trial. With --vram it says whether the trial fits cards of these sizes in GiB, and what to
change where it does not; without --vram, capacity=8gib names the card. Where neither batch_size nor seq_len is named it
adds the largest batch and row length of each method, engine and checkpointing. --table context says the longest rows
only, for all cards in one table. Nothing is loaded, downloaded or run. Exit code 0 when the trial fits (or no card was
named), 1 when that is not certain, 2 when the question cannot be answered.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from lora_lab.composition.once import compose_once
from lora_lab.config import InvalidInput
from lora_lab.fit.check import check
from lora_lab.fit.display import show_context, show_estimate, show_limits, show_verdicts
from lora_lab.fit.estimate import estimate
from lora_lab.fit.shapes import shapes_of
from lora_lab.outcome import EXIT_INTERRUPTED, EXIT_REFUSED
from lora_lab.output import never_end_for_output

EXIT_NOT_CERTAIN = 1
_LARGEST_GIB = 10**6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    never_end_for_output()
    parser = argparse.ArgumentParser("lora-lab fit", description=__doc__, add_help=False)
    parser.add_argument("--vram", type=_cards, default=[])
    parser.add_argument("--table", choices=["context"])
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        usage = "usage: lora-lab fit [--vram GIB[,GIB...]] [--table context] [group=option ...] [key=value ...]"
        print(f"{usage}\n\n{__doc__}")
        return 0
    asked, typed = parser.parse_known_args(arguments)
    console = Console()
    try:
        config = compose_once(typed, own=[f"--{name}" for name in vars(asked)])
        cards = asked.vram or [size for size in [config.vram_limit_gib] if size is not None]
        if asked.table and not cards:
            raise InvalidInput("--table context needs sizes of cards, for example --vram 8,12,16,24.")
        shapes = shapes_of(config.model)
        check(config, shapes)
        if asked.table:
            show_context(config, shapes, cards, console)
            return 0
        found = estimate(config, shapes)
        fits = not cards or show_verdicts(found, config, shapes, cards, console)
        show_estimate(found, console)
        if cards and not any(word.partition("=")[0] in ("batch_size", "seq_len") for word in typed):
            show_limits(config, shapes, cards, console)
    except InvalidInput as refusal:
        print(f"Refused:\n{refusal}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0 if fits else EXIT_NOT_CERTAIN


def _cards(text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(0 < size < _LARGEST_GIB for size in sizes):
        raise argparse.ArgumentTypeError(f"{text} is not a list of sizes in GiB. Type for example --vram 8,12.")
    return sizes


if __name__ == "__main__":
    raise SystemExit(main())
