"""Differences of held-out loss between settings, paired by the held-out rows, with intervals over the rows.

The rows are what is uncertain here: which ones were held out. What another seed would change is not in the intervals.
"""

from collections.abc import Sequence

from lora_lab.quality.paired import Change
from lora_lab.quality.row_losses import HeldoutRows, difference, heldout_rows, mean_of
from lora_lab.report.measures import LOSS
from lora_lab.store.trials import Trial


def rows_of(trials: Sequence[Trial]) -> HeldoutRows | None:
    """Return the mean loss of each held-out row over the trials of one setting.

    Returns: None where a trial kept no rows, or other ones, or its loss says nothing."""
    found = [heldout_rows(trial.tags) for trial in trials if LOSS.of(trial) is not None]
    kept = [rows for rows in found if rows is not None]
    return mean_of(kept) if kept and len(kept) == len(found) else None


def loss_over(of: Sequence[Trial], over: Sequence[Trial]) -> Change | None:
    """Return the held-out loss of one setting minus that of another, by the rows that both were evaluated on; None
    where they were not evaluated on the same ones."""
    return difference(rows_of(of), rows_of(over))
