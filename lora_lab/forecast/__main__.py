"""Say how long a trial will take, how much energy and money, before it runs.

    python -m lora_lab.forecast data=chat data.path=mine.jsonl train.epochs=3 --price 0.30/kWh --rent 2.50/h
    python -m lora_lab.forecast data=chat data.path=mine.jsonl train.epochs=3 --probe
    python -m lora_lab.forecast model=llama3_1_8b train.epochs=1 --card rtx4090

It takes the settings of a trial. The answer comes from your own finished trials of the same settings on this card;
without one, from the card's two rates, measured once. --probe measures about 50 rows first, as an ordinary trial.
--card NAME forecasts for a card that is not here. --price is of a kWh, --rent of an hour, --card-price of the card, in
any one currency; measure.price_per_kwh is used without --price. Nothing is trained without --probe.
Exit code 0 with an answer, 2 for invalid input.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console

from lora_lab.composition.once import compose_once
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.forecast.advice import advice
from lora_lab.forecast.ask import Device, ask
from lora_lab.forecast.cards import CARDS, card_named
from lora_lab.forecast.display import show
from lora_lab.forecast.fitted import constants
from lora_lab.forecast.money import Prices, read_price
from lora_lab.forecast.probe import probe
from lora_lab.forecast.roofline import StepTime
from lora_lab.outcome import EXIT_INTERRUPTED, EXIT_REFUSED
from lora_lab.output import never_end_for_output
from lora_lab.trial.inputs import check_data

EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    never_end_for_output()
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        options = "[--probe] [--card NAME] [--price P] [--rent P] [--card-price P]"
        print(f"usage: lora-lab forecast {options} [group=option ...] [key=value ...]\n\n{__doc__}")
        return 0
    asked, typed = _parser().parse_known_args(arguments)
    try:
        _answer(asked, typed, Console())
    except InvalidInput as refusal:
        print(f"Refused:\n{refusal}", file=sys.stderr)
        return EXIT_REFUSED
    except BrokenProcessPool:
        print("The process that read the rows ended early, perhaps for lack of memory.", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lora-lab forecast", add_help=False, allow_abbrev=False)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--card")
    parser.add_argument("--price")
    parser.add_argument("--rent")
    parser.add_argument("--card-price")
    return parser


def _answer(asked: argparse.Namespace, typed: list[str], console: Console) -> None:
    """Forecast and show.

    Raises: InvalidInput."""
    if asked.card and asked.probe:
        raise InvalidInput("--probe measures this machine, and --card names another. Leave one of them out.")
    config = compose_once(typed, own=[f"--{name.replace('_', '-')}" for name in vars(asked)])
    prices = _prices(asked, config)
    check_data(config)
    question = ask(config, card_named(asked.card) if asked.card else None)
    folder = probe(typed, config, question.step.seconds) if asked.probe else None
    answer = question.answer(folder)
    notes = _notes(question.device, question.step)
    show(answer, prices, notes, advice(config, answer, not question.device.is_cpu), console)


def _prices(asked: argparse.Namespace, config: TrialConfig) -> Prices:
    return Prices(
        kwh=read_price(asked.price, "kWh", "--price") if asked.price else config.measure.price_per_kwh,
        hour=read_price(asked.rent, "h", "--rent") if asked.rent else None,
        card=read_price(asked.card_price, "", "--card-price") if asked.card_price else None,
    )


def _notes(device: Device, step: StepTime) -> list[str]:
    """Return sentences about what the forecast rests on."""
    notes = []
    if device.is_cpu:
        notes.append(
            f"No GPU was found or asked for, so this is for this machine's CPU ({device.name}). For a card that is not "
            f"here: --card {'|'.join(CARDS)}."
        )
    elif step.host > step.card:
        notes.append("The host takes longer than the card here, and hosts differ more than cards do: --probe tells.")
    if not device.is_here:
        notes.append("The card's rates are published ones, less what measured cards did not attain.")
    if not device.is_cpu and not any(kind in device.name for kind in constants().cards):
        notes.append(
            "No trial on such a card was measured; the interval is taken to be twice as wide as on those that were."
        )
    return notes


if __name__ == "__main__":
    sys.exit(main())
