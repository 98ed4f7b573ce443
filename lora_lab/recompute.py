"""Recompute every figure of a run from its stored files, and compare: python -m lora_lab.recompute RUN

RUN is a trial's folder, or its id or the beginning of one. An id is looked up in the folders under multirun/ first,
then in the store. Figures are compared to the last digit. Exit code 0 when all agree, 1 when some differ, 2 when RUN
cannot be read."""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_lab.config import InvalidInput
from lora_lab.outcome import EXIT_REFUSED, End, Outcome
from lora_lab.output import never_end_for_output
from lora_lab.reading import Damaged
from lora_lab.store.attempts import joined
from lora_lab.store.environment import environment
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.folder_runs import FolderRuns
from lora_lab.store.local_store import local_address
from lora_lab.store.mlflow_client import fetch_run
from lora_lab.store.record import Record, complete
from lora_lab.store.stored_runs import open_store
from lora_lab.store.trial_folder import ATTEMPTS, IDLE, MANIFEST, SEEN, SENSELESS, Inputs, TrialFolder
from lora_lab.telemetry.figures import TAGS
from lora_lab.telemetry.host_facts import Idle
from lora_lab.telemetry.idle_draw import idle_draw
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.summary import summarise

_WHOLE_ID = 32
"""Characters of a run's id."""

NEEDED = (MANIFEST, SEEN, "events.jsonl", "samples.jsonl")
"""The files that figures are calculated from. Where the idle power was measured, its readings come in addition."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The figures that a run's record states."""

    name: str
    """What the user typed to name it."""
    metrics: dict[str, float]
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Recorded figures next to recomputed ones."""

    figures: int
    """Number of figures that are in at least one of the two."""
    events: int
    samples: int
    differences: list[tuple[str, str, str]]
    """Name, recorded value, recomputed value; a value is empty where one side has none."""
    damaged: list[str]
    """Lines of events and samples that cannot be read. The lines after them are left out."""


def compare(folder: TrialFolder, recorded: Recorded) -> Comparison:
    """Recompute the figures of the trial in `folder` and compare them with the recorded ones.

    Raises: InvalidInput when that is not a whole trial of this version."""
    missing = [name for name in NEEDED if not (folder.path / name).is_file()]
    if missing:
        raise InvalidInput(
            f"{recorded.name} holds no {', '.join(missing)}: it is not a trial, or it is of a version that did not "
            "keep all files that its figures are calculated from."
        )
    try:
        asked, (events, samples, seen, damaged) = folder.manifest(), folder.read_inputs()
        watched = folder.idle()
    except Damaged as fault:
        raise InvalidInput(
            f"the files of {recorded.name} were edited or damaged, or are of another version: {fault}"
        ) from None
    outcome = recorded.tags.get("outcome")
    if asked is None or outcome not in Outcome.__members__:
        raise InvalidInput(f"the files of {recorded.name} were edited or damaged, or are of another version.")
    if seen.idle is not None and watched is None:
        raise InvalidInput(f"{recorded.name} holds no {IDLE}, from which its idle power was calculated.")
    if watched is not None:
        seen.idle = _idle_anew(*watched)
    record = Record(name=asked.record.name, params={})
    earlier, faults = folder.earlier()
    every = joined(earlier, Inputs(asked=asked, events=events, samples=samples, seen=seen))
    damaged += faults
    try:
        summary = summarise(every.events, every.samples, every.seen, every.asked.t)
        end = End(outcome=Outcome(outcome), reason="")
        complete(record, end, every.events, every.samples, summary, asked.unix_minus_monotonic)
    except SENSELESS as error:
        raise InvalidInput(
            f"no figures can be calculated from the files of {recorded.name} ({type(error).__name__}: {error})."
        ) from error
    here = _said(_with_series(record), record.tags)
    there = _said(recorded.metrics, recorded.tags)
    if not _of_this_code(recorded):
        here = {name: text for name, text in here.items() if not _newer(name, there)}
    names = sorted(here.keys() | there.keys())
    apart = [(name, there.get(name, ""), here.get(name, "")) for name in names if here.get(name) != there.get(name)]
    return Comparison(len(names), len(every.events), len(every.samples), apart, [str(fault) for fault in damaged])


def _of_this_code(recorded: Recorded) -> bool:
    return recorded.tags.get("code.telemetry") == environment()["code.telemetry"]


def _newer(name: str, there: dict[str, str]) -> bool:
    """Return whether `name` is the reason for the absence of a figure that the run does not mention at all. Its version
    did not have the figure."""
    figure = name.removeprefix("absent.")
    return figure != name and not {figure, name} & there.keys()


def _idle_anew(idle: Idle, samples: list[Sample]) -> Idle:
    """Recalculate the idle power from its readings. When these are not enough, it stays as it was recorded."""
    found = idle_draw(idle.start, idle.end, samples)
    return idle if isinstance(found, str) else replace(idle, watts=found[0], error_watts=found[1], source=found[2])


def _said(metrics: dict[str, float], tags: dict[str, str]) -> dict[str, str]:
    """Return figures, reasons and verdicts as text."""
    words = {name: text for name, text in tags.items() if name.startswith("absent.") or name in TAGS}
    return {name: _digits(value) for name, value in metrics.items()} | words


def _with_series(record: Record) -> dict[str, float]:
    """Return the figures, with the last point of each series among them as in a store."""
    return record.metrics | {point.key: point.value for point in record.series}


def _digits(value: float) -> str:
    """Return every digit of a number. A store that cannot hold infinity keeps the largest number instead."""
    return repr(math.copysign(sys.float_info.max, value) if math.isinf(value) else value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    never_end_for_output()
    parser = argparse.ArgumentParser(prog="python -m lora_lab.recompute", description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", metavar="RUN", help="a trial's folder under multirun/, or a trial's id or the beginning of one"
    )
    parser.add_argument(
        "--store",
        metavar="URI",
        help="read this store only (default: the folders under multirun/, then the local store under mlruns/)",
    )
    asked = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as place:
            folder, recorded = _find(asked.run, asked.store, Path(place))
            found = compare(folder, recorded)
    except (InvalidInput, TrackingFailed) as refusal:
        print(refusal, file=sys.stderr)
        return EXIT_REFUSED
    _show(found, recorded)
    return 1 if found.differences else 0


def _find(run: str, store: str | None, place: Path) -> tuple[TrialFolder, Recorded]:
    """Find a trial's files and its recorded figures. Files of a run in the store are fetched to `place`.

    Raises: InvalidInput, TrackingFailed."""
    if not run:
        raise InvalidInput("RUN is empty. Name a trial by its folder, its id or the beginning of its id.")
    folder = Path(run) if Path(run).is_dir() else None
    if folder is None and store is None:
        folder = FolderRuns(experiment=None).trial_folder(run)
    if folder is not None:
        return _recorded(TrialFolder(folder), run)
    try:
        store = local_address() if store is None else store
    except InvalidInput as missing:
        raise InvalidInput(f"{run} is neither a folder nor the id of a trial under multirun/, and {missing}") from None
    if len(run) < _WHOLE_ID:
        run = open_store(store).id_of(run)
    metrics, tags = fetch_run(store, run, (*NEEDED, IDLE, ATTEMPTS), place)
    if "outcome" not in tags or "sweep/trials" in metrics:
        raise InvalidInput(f"run {run} is not a trial of lora_lab; for a sweep, name one of its trials.")
    return TrialFolder(place), Recorded(run, metrics, tags)


def _recorded(folder: TrialFolder, run: str) -> tuple[TrialFolder, Recorded]:
    try:
        record = folder.record()
    except Damaged as damaged:
        raise InvalidInput(f"{run} holds no record that can be read: {damaged}") from None
    if record is None:
        raise InvalidInput(f"{run} holds no record of a trial that has ended.")
    return folder, Recorded(run, _with_series(record), record.tags)


def _show(found: Comparison, recorded: Recorded) -> None:
    console = Console(soft_wrap=True)
    if not _of_this_code(recorded):
        console.print("the run was recorded by another version of the code, whose formulas may differ", style="yellow")
    for fault in found.damaged:
        console.print(f"{fault}; the lines after it are left out", style="yellow", highlight=False, markup=False)
    source = f"{found.figures} figures and reasons from {found.events} events and {found.samples} samples"
    if not found.differences:
        console.print(f"{source}: all recomputed the same, to the last digit", highlight=False)
        return
    table = Table(title=f"{source}: {len(found.differences)} differ", title_justify="left")
    for head in ("figure", "recorded", "recomputed"):
        table.add_column(head, overflow="fold")
    for row in found.differences:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
