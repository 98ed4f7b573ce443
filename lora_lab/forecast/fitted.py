"""The forecast's constants and their errors on held-out trials, as benchmarks/forecast_fit.py has fitted them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lora_lab.reading import whole

FILE = Path(__file__).with_name("fitted.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The errors of forecasts of trials that the constants were not fitted on, as shares of what was measured."""

    cells: int
    median: float
    p90: float
    worst: float
    half: float
    """Half the 90 % interval, as a logarithm."""
    covered: float
    """The share of held-out trials in the interval that the other groups of trials make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByRegime:
    """Errors where the card takes longer than the host, and where the host does."""

    card: Judged
    host: Judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """A card's power as a share of its limit: base + slope x the share of a step in which the card works."""

    base: float
    slope: float
    judged: Judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """What was fitted on CPUs."""

    constants: dict[str, float]
    judged: Judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """All that was fitted."""

    cards: list[str]
    """Parts of the names of the cards that trials were measured on."""
    constants: dict[str, float]
    cpu: Cpu
    roofline: ByRegime
    probe: ByRegime
    """Of a trial forecast by another one just before it on the same machine."""
    stored: ByRegime
    """Of a trial forecast by one on another machine with the same card."""
    power: Power


@cache
def constants() -> Constants:
    """Return the constants that come with lora_lab."""
    found = whole(Constants, FILE)
    if found is None:
        raise FileNotFoundError(f"{FILE} is missing: install lora_lab again")
    return found
