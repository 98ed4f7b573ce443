"""What the sensors said of planted square waves, from the stored figures of a real card."""

import json

from benchmarks.reports import RESULTS
from benchmarks.square_figures import summary


def square_wave() -> str:
    """Return the table of sensors by period, with the card it holds for."""
    stored = json.loads((RESULTS / "h200" / "square_wave.json").read_text(encoding="utf-8"))
    origin = stored["origin"]
    how = f"{origin['device']}, driver {origin['device.driver']}, {origin['date']}, commit {origin['commit']}"
    return f"{summary(stored['waves'])}\n\n{how}: `{origin['command']}`."
