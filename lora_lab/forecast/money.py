"""Turn hours and kWh into money, and compare buying a card with renting one."""

import re
from dataclasses import dataclass

from lora_lab.config import InvalidInput
from lora_lab.forecast.estimate import Range


@dataclass(frozen=True, slots=True)
class Prices:
    """What things cost, in one currency."""

    kwh: float | None = None
    hour: float | None = None
    """Of renting the card."""
    card: float | None = None


def read_price(text: str, unit: str, option: str) -> float:
    """Return the number of '0.30/kWh' or '0.30'.

    Raises: InvalidInput."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?|\.\d+)(?:\s*/\s*{unit})?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        example = f"{option} 0.30/{unit}" if unit else f"{option} 1600"
        raise InvalidInput(f"{option} {text} is not a price. Give a number above 0, for example {example}.")
    return float(found[1])


def electricity(kwh: Range | None, prices: Prices) -> Range | None:
    """Return the cost of the energy; None where the energy or the price is not known."""
    return None if kwh is None or prices.kwh is None else kwh.times(prices.kwh)


def rented(seconds: Range, prices: Prices) -> Range | None:
    """Return the cost of renting for the time; None without a price."""
    return None if prices.hour is None else seconds.times(prices.hour / 3600)


def hours_to_own(kwh: Range | None, seconds: Range, prices: Prices) -> float | str | None:
    """Return the hours of training after which a bought card has cost less than renting one as fast.

    Returns: hours; a sentence where that never happens, or cannot be said; None where it was not asked for.
    """
    if prices.card is None:
        return None
    if prices.hour is None:
        return "The hours until buying pays need the price of renting: --rent 2.50/h."
    running = 0.0
    if prices.kwh is not None and kwh is not None:
        running = kwh.value / (seconds.value / 3600) * prices.kwh
    if running >= prices.hour:
        return "Buying never pays: an hour's electricity costs more than an hour of renting."
    return prices.card / (prices.hour - running)
