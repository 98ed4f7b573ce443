"""Finish a trial: compute its figures, complete its record, and write both into its folder."""

import time

from lora_lab.events import Ended, Event
from lora_lab.outcome import End, Outcome, end_said
from lora_lab.reading import Damaged
from lora_lab.store.attempts import joined, seconds_between
from lora_lab.store.record import Record, complete
from lora_lab.store.trial_folder import NOT_SEEN, SEEN, SENSELESS, Inputs, Manifest, TrialFolder
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.summary import summarise


def finish(
    folder: TrialFolder,
    asked: Manifest,
    end: End,
    events: list[Event],
    samples: list[Sample],
    seen: HostFacts,
    over_ms: int | None = None,
) -> tuple[Record, Summary]:
    """Summarise a trial, complete its record, and write both into its folder. A job's earlier attempts are joined.

    Args:
        over_ms: when it was over (Unix time), if no event says so. The default is now.
    """
    record = asked.record
    earlier, damaged = folder.earlier()
    latest = Inputs(asked=asked, events=events, samples=samples, seen=seen)
    every = joined(earlier, latest)
    summary = summarise(every.events, every.samples, every.seen, every.asked.t)
    summary.warnings += [f"{fault}; the file is left out from there on" for fault in damaged]
    record.ended_ms = over_ms or round(time.time() * 1e3)
    complete(record, end, every.events, every.samples, summary, asked.unix_minus_monotonic)
    folder.write_end(record, summary, end, seen, seconds_between(earlier, latest))
    return record, summary


def finish_for_dead(folder: TrialFolder, asked: Manifest) -> Record:
    """Make the record of a trial whose process is gone, from what the process had written.

    Damaged parts are left out, with a warning in the record.

    Raises: Damaged when no record can be made from the rest.
    """
    try:
        events, samples, seen, damaged = folder.read_inputs()
    except Damaged as fault:
        if (folder.path / SEEN).is_dir():  # then the file cannot be written again either
            raise
        seen = HostFacts(no_sensor=NOT_SEEN)
        events, samples, damaged = folder.read_lines()
        damaged.append(fault)
    seen.warnings += [f"{fault}; the file is left out from there on" for fault in damaged]
    try:
        # without any event the trial ends when it began: no later time is known
        return finish(folder, asked, _end_of_dead(events), events, samples, seen, asked.record.started_ms)[0]
    except SENSELESS as error:
        raise Damaged(folder.path / "events.jsonl", "", f"cannot be used ({type(error).__name__}: {error})") from error


def _end_of_dead(events: list[Event]) -> End:
    """Return the end that the lead worker reported, or that of another worker that failed before it."""
    for event in events:
        if isinstance(event, Ended) and (event.rank == 0 or event.outcome != Outcome.finished.value):
            return end_said(event)
    why = "the process that ran lora_lab was gone: it was killed, or the machine stopped"
    return End(outcome=Outcome.killed, reason=why)
