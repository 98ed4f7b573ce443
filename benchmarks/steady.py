"""Cut the windows of the trials of benchmarks/sweep/steady.yaml into parts: how much do they differ in J/token?

    python -m benchmarks.steady SWEEP OUT

SWEEP is the sweep's folder. A part takes at least 5 s and ends where a step does. The spread over whole trials is what
`report --table` shows.
"""

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.reports import finished_trials, markdown, provenance, write_report
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.telemetry.energy import window_energy
from lora_lab.telemetry.window import Window, find_window, steady

PART_SECONDS = 5.0


def parts(window: Window) -> Iterator[Window]:
    """Yield consecutive parts of at least PART_SECONDS; the rest at the end is left out."""
    first = 0
    for last in range(len(window.steps)):
        part = window.part(first, last + 1 - first)
        if part.seconds >= PART_SECONDS:
            yield part
            first = last + 1


def deviations(folder: TrialFolder) -> list[float]:
    """Return J/token of each part over that of the whole window, minus 1."""
    events, samples, _, _ = folder.read_inputs()
    found = find_window(events)
    if found is None:
        return []
    whole = steady(found)

    def joules_per_token(window: Window) -> float | None:
        joules = window_energy(window.start, window.end, samples).joules
        return None if joules is None else joules / sum(step.real for step in window.steps)

    usual = joules_per_token(whole)
    each = [joules_per_token(part) for part in parts(whole)]
    return [] if usual is None else [figure / usual - 1 for figure in each if figure is not None]


def main() -> None:
    sweep, out = map(Path, sys.argv[1:])
    by_shape: dict[str, list[float]] = {}
    tags: dict[str, str] = {}
    for folder, record in finished_trials(sweep):
        shape = f"{record.params['batch_size']}x{record.params['seq_len']}"
        by_shape.setdefault(shape, []).extend(deviations(folder))
        tags = record.tags
    rows = []
    for shape, signed in by_shape.items():
        off = [abs(part) for part in signed]
        within = str(sum(part <= 0.01 for part in off))
        middle, most = (f"{statistics.median(off):.2%}", f"{max(off):.2%}") if off else ("-", "-")
        rows.append([shape, str(len(off)), middle, most, within])
    text = markdown(["shape", "parts", "J/token off the window's, median", "at most", "by 1 % or less"], rows)
    origin = provenance(tags, "python -m benchmarks.steady SWEEP OUT")
    write_report(out, "steady_parts", f"Parts of {PART_SECONDS:g} s", origin, text, {"deviations": by_shape})
    print(text)


if __name__ == "__main__":
    main()
