"""docs/measurement.md's example by hand and docs/records.md's example of recomputing, from the trial that is kept."""

import contextlib
import io

from benchmarks.reports import RESULTS, date
from lora_lab import recompute
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.telemetry.window import find_window

TRIAL = RESULTS / "h100/trial"


def by_hand() -> str:
    """Return how tokens/s and J/token follow from the trial's files."""
    folder = TrialFolder(TRIAL)
    record = folder.record()
    window = find_window(folder.read_inputs()[0])
    assert record is not None
    assert window is not None
    real = sum(step.real for step in window.steps)
    metrics, tags = record.metrics, record.tags
    changed = " with changes not yet committed" if tags.get("dirty") == "true" else ""
    return (
        f"Its {len(window.steps)} steps of {window.steps[0].real} real tokens lie between WindowOpened at "
        f"{window.start:.3f} s and WindowClosed at {window.end:.3f} s, so\n{real:,} / {window.seconds:.3f} = "
        f"{metrics['throughput/tokens_per_second']:,.1f} tokens/s. In this time the energy counter rose by "
        f"{metrics['energy/joules']:,.1f} J, so {metrics['energy/joules_per_token']:.4f} J per token.\n"
        f"({tags['device']}, {date(record.started_ms)}, commit {tags['commit'][:7]}{changed})"
    )


def recomputed() -> str:
    """Return what `recompute` prints about the trial."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        recompute.main([str(TRIAL)])
    return f"```\n$ lora-lab recompute benchmarks/results/h100/trial\n{printed.getvalue().strip()}\n```"
