"""The folder of a trial. A kill at any moment loses nothing that was reported before it.

`trial.json` says what was asked for and by which process. Events and samples follow line by line. `record.json`
appears whole or not at all. Once it is there, the trial is over. `delivered.json` says which store has the record."""

import contextlib
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_lab.base_weights import ADAPTER, WEIGHTS, trained_in
from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.events import Event, decode, encode
from lora_lab.files import write_json, write_text
from lora_lab.outcome import End, Outcome
from lora_lab.quality.answer_rows import ANSWERS
from lora_lab.reading import Damaged, lines, whole
from lora_lab.seat import LOG, OTHERS
from lora_lab.secrets import clean
from lora_lab.store.adapter_card import write_card
from lora_lab.store.journal import Journal
from lora_lab.store.process_id import Owner
from lora_lab.store.record import RUNNING, Record, plain
from lora_lab.store.tracker import Which
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.host_facts import HostFacts, Idle
from lora_lab.telemetry.sampler import Sample

MANIFEST = "trial.json"
SEEN = "seen.json"
IDLE = "idle.jsonl"
RECORD = "record.json"
SUMMARY = "summary.json"
DELIVERED = "delivered.json"
ATTEMPTS = "attempts"
"""The folder of the earlier attempts at a job: one folder each, by their number from 1."""
SENSELESS = (ArithmeticError, LookupError, TypeError, ValueError)
"""The errors of computing figures from numbers that have the right type but impossible values."""
NOT_SEEN = "the facts about the machine are missing (seen.json): another version made this trial, or its disk failed"
LEFT_OVER = ("events.jsonl", LOG, OTHERS)
"""What a trial leaves whose input was refused. It shows how far the trial came."""

_ARTIFACTS = (
    *(
        "config.yaml",
        "environment.json",
        MANIFEST,
        *LEFT_OVER,
        "samples.jsonl",
        SEEN,
        IDLE,
        "traceback.txt",
        SUMMARY,
        WEIGHTS,
        ANSWERS,
    ),
    *(ADAPTER, ATTEMPTS),
)
"""What a trial writes and the store keeps with its run. record.json is not among them, because it is the run itself.
Nor is a whole model, which would take its gigabytes twice."""

_OF_AN_ATTEMPT = ("events.jsonl", "samples.jsonl", SEEN, IDLE)
"""What a resumed job keeps of the attempt before, with its manifest."""

_OF_AN_END = (RECORD, DELIVERED, SUMMARY, "traceback.txt")
"""What a resumed job writes again at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is known before a trial starts. It is needed to record the trial if its process is killed."""

    owner: Owner
    t: float
    """When it was asked for, in seconds of time.monotonic()."""
    tracking: TrackingConfig
    record: Record
    unix_minus_monotonic: float = field(default_factory=lambda: time.time() - time.monotonic())
    """Seconds that turn an event's `t` into Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delivered:
    """The store that has the record."""

    run_id: str
    store: Which | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outline:
    """What summary.json says about a trial."""

    name: str = ""
    outcome: Outcome
    reason: str
    seconds: float
    point: str
    device: str
    metrics: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)
    warnings: list[str]
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    """Every setting; empty in a folder of an older version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the figures of one attempt are computed from."""

    asked: Manifest
    events: list[Event]
    samples: list[Sample]
    seen: HostFacts


class TrialFolder:
    """The folder of one trial."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: Journal | None = None
        self._samples: Journal | None = None

    def begin(self, asked: Manifest, config: TrialConfig, facts: dict[str, str], seen: HostFacts) -> None:
        """Write what was asked for, and open the files for events and samples.

        Raises: OSError when nothing can be written here."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
        write_json(self.path / "environment.json", facts)
        write_json(self.path / SEEN, asdict(seen))
        write_json(self.path / MANIFEST, asdict(asked))
        self._events, self._samples = Journal(self.path / "events.jsonl"), Journal(self.path / "samples.jsonl")

    def note_event(self, event: Event) -> None:
        """Keep an event."""
        assert self._events is not None
        self._events.add(encode(event))

    def note_sample(self, sample: Sample) -> None:
        """Keep a sample of the card."""
        assert self._samples is not None
        self._samples.add(sample.encode())

    def note_seen(self, seen: HostFacts) -> None:
        """Write what the parent knows about the host by now."""
        with contextlib.suppress(OSError):  # at the end it is written again
            write_json(self.path / SEEN, asdict(seen))

    def keep_idle(self, idle: Idle, samples: list[Sample], seen: HostFacts) -> None:
        """Keep the card's idle power with the samples that it is computed from.

        Raises: OSError."""
        seen.idle = idle
        write_text(self.path / IDLE, "".join(f"{sample.encode()}\n" for sample in samples))
        write_json(self.path / SEEN, asdict(seen))

    def idle(self) -> tuple[Idle, list[Sample]] | None:
        """Return the card's idle power and its samples; None unless both are here.

        Raises: Damaged."""
        seen = whole(HostFacts, self.path / SEEN)
        if seen is None or seen.idle is None or not (self.path / IDLE).is_file():
            return None
        samples, damaged = lines(self.path / IDLE, Sample.decode)
        if damaged is not None:
            raise damaged
        return seen.idle, samples

    def give_up(self) -> None:
        """Remove the files of a trial whose input was refused, except those that show how far it came."""
        self._close()
        for name in _ARTIFACTS:
            if name not in (*LEFT_OVER, ADAPTER, ATTEMPTS):
                (self.path / name).unlink(missing_ok=True)

    def write_end(
        self, record: Record, summary: Summary, end: End, seen: HostFacts, between_seconds: float = 0.0
    ) -> None:
        """Write a trial that is over to disk. `record.json` comes last.

        If the disk is full, the record stays in memory, with a warning: the store can still take it.

        Args:
            between_seconds: how long a job lay between its attempts; that is not how long it took.
        """
        try:
            for log in (self.path / LOG, *(self.path / OTHERS).glob("*.log")):
                clean(log)
            for journal in self._journals:
                journal.complete()
            if end.traceback:
                write_text(self.path / "traceback.txt", end.traceback)
            trained = trained_in(self.path)
            if trained is not None:
                write_card(trained, record)
            write_json(self.path / SEEN, asdict(seen))
            write_json(self.path / SUMMARY, _outline(record, summary, between_seconds))
            write_json(self.path / RECORD, asdict(record))
        except OSError as error:
            summary.warnings.append(f"not everything could be written to {self.path} ({error.strerror})")
        finally:
            self._close()

    @property
    def _journals(self) -> list[Journal]:
        return [journal for journal in (self._events, self._samples) if journal is not None]

    def _close(self) -> None:
        for journal in self._journals:
            journal.close()

    def set_aside(self, asked: Manifest) -> int:
        """Move the latest attempt at a job into a folder of its own, so that another one can begin here. A kill
        meanwhile loses nothing: the next call goes on with it.

        Return the number of the attempt that begins, from 2.

        Raises: OSError, Damaged."""
        number = max(self._attempts(), default=0)
        last = whole(Manifest, self.path / ATTEMPTS / str(number) / MANIFEST)
        if last is None or (last.owner, last.t) != (asked.owner, asked.t):
            number += 1
        place = self.path / ATTEMPTS / str(number)
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / MANIFEST, asdict(asked))
        for name in _OF_AN_ATTEMPT:
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).rename(place / name)
        for name in _OF_AN_END:
            (self.path / name).unlink(missing_ok=True)
        return number + 1

    @property
    def can_go_on(self) -> bool:
        """Return whether a job was cut off here after it had saved a checkpoint."""
        with contextlib.suppress(Damaged):
            return self.manifest() is not None and any(self.path.glob("checkpoints/*/complete.json"))
        return False

    @property
    def resume_command(self) -> str:
        """Return the command that goes on with a job that was cut off here."""
        return f"python -m lora_lab resume=true hydra.run.dir={shlex.quote(str(self.path.resolve()))}"

    def earlier(self) -> tuple[list[Inputs], list[Damaged]]:
        """Return what the earlier attempts at a job left, in order, and what is wrong with damaged parts of it."""
        found: list[Inputs] = []
        faults: list[Damaged] = []
        for number in sorted(self._attempts()):
            there = TrialFolder(self.path / ATTEMPTS / str(number))
            try:
                asked = there.manifest()
                events, samples, seen, damaged = there.read_inputs()
            except Damaged as fault:
                faults.append(fault)
                continue
            faults += damaged
            if asked is not None:
                found.append(Inputs(asked=asked, events=events, samples=samples, seen=seen))
        return found, faults

    def _attempts(self) -> list[int]:
        return [int(path.name) for path in (self.path / ATTEMPTS).glob("[1-9]*") if path.name.isdecimal()]

    def manifest(self) -> Manifest | None:
        """Return what was asked for here; None when no trial began, or one of an older version.

        Raises: Damaged."""
        asked = whole(Manifest, self.path / MANIFEST)
        if asked is None and (self.path / RECORD).is_file() and not self.delivered:
            raise Damaged(self.path / MANIFEST, "", f"is missing, though {RECORD} is there")
        return asked

    def record(self, series: bool = True) -> Record | None:
        """Return the record, with its series or without; None while the trial is not over.

        Raises: Damaged."""
        record = whole(Record, self.path / RECORD, without="" if series else "series")
        if record is not None and (record.outcome == RUNNING or record.outcome not in Outcome.__members__):
            raise Damaged(self.path / RECORD, "outcome", "is not one that a trial ends with")
        return record

    def outline(self) -> dict[str, Any] | None:
        """Return outcome, reason, seconds and figures, without the series; None while the trial is not over.

        Raises: Damaged, also when no store has the record and it cannot be read."""
        if (not self.delivered and self.record() is None) or not (self.path / RECORD).is_file():
            return None
        outline = whole(_Outline, self.path / SUMMARY)
        if outline is None:
            raise Damaged(self.path / SUMMARY, "", f"is missing, though {RECORD} is there")
        return asdict(outline) | {"outcome": outline.outcome.value}

    def read_inputs(self) -> tuple[list[Event], list[Sample], HostFacts, list[Damaged]]:
        """Return everything that the figures are computed from, and what is wrong with damaged lines.

        Lines after a damaged one are not read.

        Raises: Damaged.
        """
        seen = whole(HostFacts, self.path / SEEN)
        events, samples, damaged = self.read_lines()
        return events, samples, seen or HostFacts(no_sensor=NOT_SEEN), damaged

    def read_lines(self) -> tuple[list[Event], list[Sample], list[Damaged]]:
        """Return the events and samples, and what is wrong with damaged lines. Lines after a damaged one are not
        read. While the trial runs in this process, lines that did not fit on the disk are among them."""
        events, fault = lines(self.path / "events.jsonl", decode, _noted(self._events))
        samples, other = lines(self.path / "samples.jsonl", Sample.decode, _noted(self._samples))
        return events, samples, [one for one in (fault, other) if one is not None]

    def add_tags(self, tags: Mapping[str, str]) -> str | None:
        """Add what a sweep finds out about a trial that is over to its record.

        Return the store's id of the run; None where no store has it yet, or the trial is not over.

        Raises: Damaged, OSError."""
        record = self.record()
        if record is None:
            return None
        record.tags |= tags
        write_json(self.path / RECORD, asdict(record))
        delivered = self._delivered()
        return None if delivered is None else delivered.run_id

    @property
    def delivered(self) -> bool:
        """Return whether a store has the record.

        If the note of that cannot be read, the record is delivered and noted once more, which changes nothing."""
        return self._delivered() is not None

    @property
    def delivered_to(self) -> Which | None:
        """Return the store that has the record; None when that was not noted."""
        delivered = self._delivered()
        return None if delivered is None else delivered.store

    def check_delivery_note(self) -> None:
        """Raise Damaged when there is a note that a store has the record, and it cannot be read."""
        whole(_Delivered, self.path / DELIVERED)

    def _delivered(self) -> _Delivered | None:
        with contextlib.suppress(Damaged):
            return whole(_Delivered, self.path / DELIVERED)
        return None

    def mark_delivered(self, run_id: str, which: Which | None = None) -> None:
        """Note which store has the record, and its id of the run.

        On a full disk the next start delivers the record again, which changes nothing."""
        try:
            write_json(self.path / DELIVERED, {"run_id": run_id} | ({"store": asdict(which)} if which else {}))
        except OSError:
            return

    def artifacts(self) -> list[Path]:
        """Return what goes into the store with the figures: what the trial itself wrote, by name."""
        there = (self.path / name for name in sorted(_ARTIFACTS))
        return [path for path in there if path.exists() and not path.is_symlink()]


def _noted(journal: Journal | None) -> bytes | None:
    """Return what was noted in this process; None where nothing was, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError):  # a closed file is a ValueError
        return None if journal is None else journal.read()
    return None


def _outline(record: Record, summary: Summary, between_seconds: float) -> dict[str, Any]:
    ran = {key: value for key, value in record.tags.items() if key == "stand_ins"}
    return {
        "name": record.name,
        "outcome": record.outcome,
        "reason": record.tags.get("reason", ""),
        "seconds": ((record.ended_ms or record.started_ms) - record.started_ms) / 1e3 - between_seconds,
        "point": record.tags.get("point", ""),
        "device": record.tags.get("device", ""),
        **asdict(summary),
        "tags": summary.tags | ran,
        "params": record.params,
    }
