"""docs/forecast.md's table of errors, from lora_lab/forecast/fitted.json."""

import math

from benchmarks.reports import markdown
from lora_lab.forecast.fitted import Judged, constants


def forecast_errors() -> str:
    """Return how far forecasts were from held-out trials."""
    found = constants()
    rows = [
        ("time, from the card's rates; the card takes longer than the host", found.roofline.card),
        ("time, from the card's rates; the host takes longer", found.roofline.host),
        ("time, from a trial just before on the same machine; the card takes longer", found.probe.card),
        ("time, from a trial just before on the same machine; the host takes longer", found.probe.host),
        ("time, from a trial on another machine with such a card; the card takes longer", found.stored.card),
        ("time, from a trial on another machine with such a card; the host takes longer", found.stored.host),
        ("power, from the card's limit", found.power.judged),
        ("time of a CPU's step, from its rates", found.cpu.judged),
    ]
    head = ["forecast", "cases", "median", "90th percentile", "worst", "90 % interval", "covers"]
    return markdown(head, [[name, *_cells(judged)] for name, judged in rows])


def _cells(judged: Judged) -> list[str]:
    interval = f"{math.expm1(-judged.half):+.0%} to {math.expm1(judged.half):+.0%}"
    shares = (f"{share:.0%}" for share in (judged.median, judged.p90, judged.worst))
    return [str(judged.cells), *shares, interval, f"{judged.covered:.0%}"]
