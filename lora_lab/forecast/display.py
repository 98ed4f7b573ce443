"""Show a forecast: the answer first, then where it comes from, then what to do."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lora_lab.forecast.estimate import Forecast, Range
from lora_lab.forecast.money import Prices, electricity, hours_to_own, rented
from lora_lab.forecast.total import Total

_MINUTE, _HOUR = 60.0, 3600.0


def show(found: Forecast, prices: Prices, notes: Sequence[str], advice: Sequence[str], console: Console) -> None:
    """Print a forecast."""
    console.print(headline(found, prices), style="bold", highlight=False, markup=False, soft_wrap=True)
    work = found.work
    _line(console, f"From {found.source.name}: {found.step_seconds:.3g} s a step. Brackets hold 90 % intervals.")
    for note in notes:
        _line(console, note)
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for part in found.parts:
        table.add_row(part.name, duration(part.seconds))
    console.print(table)
    slots = sum(batch.slots for batch in work.epoch)
    real = sum(batch.real for batch in work.epoch)
    trained = sum(batch.trained for batch in work.epoch)
    share = work.steps / work.steps_per_epoch
    _line(
        console,
        f"{work.steps:,} steps ({share:.3g} epochs): {real * share:,.0f} real tokens, of which {trained * share:,.0f} "
        f"are trained, in {slots * share:,.0f} slots with padding; {found.operations / 1e15:,.3g} PFLOP.",
    )
    pays = hours_to_own(found.kwh, found.seconds, prices)
    if isinstance(pays, str):
        _line(console, pays)
    elif pays is not None:
        _line(console, f"Buying has cost less than renting after {pays:,.0f} h of training on such a card.")
    for sentence in advice:
        _line(console, f"  {sentence}")


def headline(found: Forecast, prices: Prices) -> str:
    """Return the answer in one line."""
    said = [f"about {interval_of_time(found.seconds)}"]
    if found.kwh is None:
        said.append(f"energy not known ({found.no_kwh})")
    else:
        said.append(_interval(found.kwh, "kWh"))
    cost = electricity(found.kwh, prices)
    if cost is not None:
        said.append(f"{_money(cost)} in electricity")
    line = ", ".join(said)
    rent = rented(found.seconds, prices)
    return line if rent is None else f"{line}, or {_money(rent)} rented"


def _money(cost: Range) -> str:
    return f"{cost.value:,.2f}" if cost.value >= 0.1 else f"{cost.value:.2g}"


def in_one_line(found: Total) -> str:
    """Return what many trials will take, and where that is from."""
    named = sum(found.points.values())
    parts = [f"{number} point{'' if number == 1 else 's'} {source}" for source, number in found.points.items()]
    parts += [f"{number} unknown ({why})" for why, number in found.unknown.items()]
    if not named:
        return f"time: {', '.join(parts)}"
    energy = f", {_interval(found.kwh, 'kWh')}" if found.without_energy < named else ", energy not measured"
    if 0 < found.without_energy < named:
        energy += f" without that of {found.without_energy} of the points"
    return f"time: about {interval_of_time(found.seconds)}{energy}; {', '.join(parts)}"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    unit, size = _unit(seconds)
    return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:,.0f} {unit}"


def interval_of_time(seconds: Range) -> str:
    """Return a time with its interval, in one unit."""
    unit, size = _unit(seconds.value)
    return _interval(seconds.times(1 / size), unit)


def _unit(seconds: float) -> tuple[str, float]:
    if seconds < 2 * _MINUTE:
        return "s", 1.0
    return ("min", _MINUTE) if seconds < 1.5 * _HOUR else ("h", _HOUR)


def _interval(found: Range, unit: str) -> str:
    digits = 0 if found.value >= 20 else 1 if found.value >= 1 else 3
    if 0 < found.value < 0.1:
        digits = 1 - math.floor(math.log10(found.value))  # two that are not 0: a short trial takes 0.00035 kWh
    low, high = max(0.0, found.low), found.high
    return f"{found.value:,.{digits}f} {unit} ({low:,.{digits}f} to {high:,.{digits}f})"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
