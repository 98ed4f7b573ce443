"""A run as any source gives it, and the trials and sweeps that the report makes from runs."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lora_lab.quality.answer_rows import AnswerRow
from lora_lab.store.mlflow_names import SERIES as NAMES
from lora_lab.store.older_runs import axes_of_today, params_of_today, tags_of_today
from lora_lab.store.record import RUNNING
from lora_lab.store.run_checks import fault_of, printable
from lora_lab.store.trials import Sweep, Trial

SERIES = tuple(NAMES)
"""Metrics that have a value for each step or sample. A store lists the last value among a run's figures, where it says
nothing about the trial."""

Found = tuple[list[Trial], list[Sweep]]
"""Both sorted by start."""

Readings = list[tuple[int, int, float]]
"""One series, sorted by time: Unix time in ms, step or number of the sample, value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of lora_lab: a trial, or a sweep above trials."""

    run_id: str
    """The store's id, or the record's if no store has the run."""
    above: str | None = None
    """The id of the sweep's run, for a trial of a sweep."""
    name: str
    started_ms: int
    """Unix time."""
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    """They include the record's id as `record_id`."""


class Source(Protocol):
    """A source that runs are read from."""

    place: str
    """The source in words, for messages."""

    def runs(self) -> Iterable[Run]:
        """Read every run.

        Raises: InvalidInput when the experiment does not exist; TrackingFailed."""

    def series(self, run_id: str, keys: Sequence[str]) -> dict[str, Readings]:
        """Read these series of a run, in any order of points. Those that it does not have are left out or empty.

        Raises: TrackingFailed."""

    def answers(self, run_id: str) -> list[AnswerRow]:
        """Return a trial's answers to held-out prompts; none where they were not kept.

        Raises: TrackingFailed."""

    def store_of(self, run_id: str) -> str:
        """Return the address of the store that has a run.

        Raises: TrackingFailed when no store has it."""


def trials_and_sweeps(runs: Iterable[Run]) -> Found:
    """Make trials and sweeps from runs. A run that cannot be lora_lab's is left out and named on stderr."""
    sound = []
    for run in runs:
        fault = fault_of(run.started_ms, run.params, run.metrics, run.tags)
        if fault:
            print(printable(f"run {run.run_id} is left out: {fault}"), file=sys.stderr)
        else:
            sound.append(_shown(run))
    sound.sort(key=lambda run: (run.started_ms, run.run_id))
    # a sweep that a kill left without its params is recognised by the runs below it
    above = {run.above for run in sound}
    sweeps = [run for run in sound if run.run_id in above or {"points", "trials"} <= run.params.keys()]
    ids = {run.run_id for run in sweeps}
    return [_trial(run) for run in sound if run.run_id not in ids], [_sweep(run) for run in sweeps]


def _trial(run: Run) -> Trial:
    return Trial(
        run_id=run.run_id,
        name=run.name,
        sweep=run.above,
        outcome=run.tags.get("outcome", RUNNING),
        params=params_of_today(run.params),
        metrics={key: value for key, value in run.metrics.items() if key not in SERIES},
        tags=tags_of_today(run.tags),
        started_ms=run.started_ms,
    )


def _sweep(run: Run) -> Sweep:
    return Sweep(
        run_id=run.run_id,
        name=run.name,
        outcome=run.tags.get("outcome", RUNNING),
        params=axes_of_today(run.params),
        tags=tags_of_today(run.tags),
        started_ms=run.started_ms,
    )


def _shown(run: Run) -> Run:
    """Return the run with texts that are safe to show."""
    params = {printable(key): printable(text) for key, text in run.params.items()}
    tags = {printable(key): printable(text) for key, text in run.tags.items()}
    return dataclasses.replace(run, name=printable(run.name), params=params, tags=tags)
