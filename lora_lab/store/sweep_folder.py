"""The folder of a sweep: its plan, written before the first trial, and a folder for each attempt at a trial."""

import contextlib
import copy
import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lora_lab.comparison.rule import Rule
from lora_lab.config import TrackingConfig
from lora_lab.files import write_json
from lora_lab.outcome import Outcome
from lora_lab.reading import Damaged, whole
from lora_lab.store.multirun import folders
from lora_lab.store.naming import point_name, trial_name
from lora_lab.store.process_id import Owner
from lora_lab.store.record import RUNNING, Record
from lora_lab.store.trial_folder import DELIVERED, RECORD, SUMMARY, TrialFolder

PLAN = "sweep.json"
_PUT_RIGHT = (
    "To continue that sweep (resume=true), put a copy of this file back: the sweep's run in the store has one among "
    "its artifacts. Without it everything is measured again. To give the sweep up, move its folder away"
)

SKIPPED = Outcome.predicted_out_of_memory.value
AGAIN = (Outcome.killed.value, Outcome.failed.value, Outcome.timed_out.value, SKIPPED)
"""Outcomes of trials that were not measured: resume runs these again, unless plan=fits skips them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One trial of a sweep, before it is run."""

    number: int
    """From 0, in the order of running. It names the trial's folder."""
    settings: dict[str, str]
    """The settings that differ between the sweep's points."""
    asked_place: int
    """The position of its point in the order asked for, from 0."""
    repeat: int
    overrides: list[str]
    """The arguments of its command line."""
    point: str
    """Digest of the config: the same for all repeats."""
    fingerprint: str
    """Digest of config, repeat and conditions. It is the same however often this trial is asked for."""
    point_name: str = ""
    """The point's name; empty in the plan of an older version."""
    tags: dict[str, str] = field(default_factory=dict)
    """What the sweep adds to the tags of its record."""

    @property
    def label(self) -> str:
        """Return the name of its point."""
        return self.point_name or point_name(self.settings) or "the only point"

    @property
    def name(self) -> str:
        """Return the name of the trial."""
        return trial_name(self.label, self.repeat)


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLarge:
    """Why a sweep with plan=fits does not run a point: the memory that it needs, and what there is, in GiB."""

    low_gib: float
    card_gib: float

    @property
    def reason(self) -> str:
        """Return it in words."""
        return (
            f"with rows of seq_len tokens it needs at least {self.low_gib:.2f} GiB, and there are {self.card_gib:.2f}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What a sweep hands to each trial that it starts, on any machine."""

    name: str
    """The trial's name, for the user."""
    parent: str
    """The id of the sweep's record."""
    number: int
    repeat: int
    point: str
    fingerprint: str
    """`number`, `repeat`, `point` and `fingerprint` are those of `Planned`."""
    too_large: TooLarge | None = None
    """Why it is recorded and not run; None for a trial that runs."""
    tags: dict[str, str] = field(default_factory=dict)
    """What the sweep adds to the tags of its record."""


@dataclass(slots=True, kw_only=True)
class Plan:
    """All trials of a sweep, and the record above them."""

    owner: Owner
    tracking: TrackingConfig
    record: Record
    conditions: dict[str, dict[str, str]]
    """Code, versions, device and data of each point, by its digest."""
    trials: list[Planned]
    launched: list[str] = field(default_factory=list)
    """Names of the folders of the trials that the present or latest start runs."""
    at_once: int = 1
    """How many trials the present or latest start runs at a time."""
    rule: Rule | None = None
    """How the sweep stops and what it answers; None unless repeats=auto."""
    spent_seconds: float = 0.0
    """The time that the blocks of trials took until the latest began; counted with repeats=auto only."""

    def membership(self, trial: Planned, too_large: TooLarge | None = None) -> Membership:
        """Return what one of the trials needs to know about its sweep."""
        return Membership(
            name=trial.name,
            parent=self.record.id,
            number=trial.number,
            repeat=trial.repeat,
            point=trial.point,
            fingerprint=trial.fingerprint,
            too_large=too_large,
            tags=trial.tags,
        )

    def planned(self, name: str) -> Planned | None:
        """Return the trial that is run in the folder `name`."""
        return self.by_folder([name])[0]

    def by_folder(self, names: Sequence[str]) -> list[Planned | None]:
        """Return the trials that are run in these folders."""
        trials = {_name(trial): trial for trial in self.trials}
        return [trials.get(name.partition("-")[0]) for name in names]


@dataclass(frozen=True, slots=True)
class Attempt:
    """The latest attempt at a trial that is over."""

    outcome: str
    reason: str
    seconds: float
    metrics: dict[str, float]
    warnings: list[str]
    tags: dict[str, str] = field(default_factory=dict)
    """Facts for judging the figures, as the store has them: validity and its reasons, stand-ins, why figures are
    absent."""

    @property
    def done(self) -> bool:
        """Return whether the trial was measured, so that another attempt gains nothing."""
        return self.outcome not in AGAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delivered:
    """What the store was given of a sweep."""

    run_id: str
    outcome: str
    ended_ms: int | None


class SweepFolder:
    """The folder of one sweep."""

    _held: ClassVar[dict[Path, Plan]] = {}
    """The plans of the sweeps that this process runs, by folder. A sweep survives the loss of its file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """Return whether a sweep was planned here, even if its plan cannot be read."""
        return os.path.lexists(self.path / PLAN) or self.path.absolute() in self._held

    def read(self) -> Plan:
        """Return the plan as it is now.

        If this process runs the sweep, a plan that was deleted or damaged is written again.

        Raises: Damaged.
        """
        try:
            plan = whole(Plan, self.path / PLAN)
            if plan is None:
                raise Damaged(self.path / PLAN, "", "is missing")
            return plan
        except Damaged as damaged:
            held = self._held.get(self.path.absolute())
            if held is None:
                raise Damaged(damaged.file, damaged.field, f"{damaged.what}. {_PUT_RIGHT}") from None
            print(f"warning: {damaged}; it is written again as it was", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                self.write(held)
            return copy.deepcopy(held)

    def hold(self, plan: Plan) -> None:
        """Keep the plan of a sweep that this process runs in memory too."""
        self._held[self.path.absolute()] = copy.deepcopy(plan)

    def write(self, plan: Plan) -> None:
        """Write the plan.

        Raises: OSError."""
        if self.path.absolute() in self._held:
            self.hold(plan)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / PLAN, asdict(plan))

    def begun(self, trial: Planned) -> bool:
        """Return whether an attempt at the trial was begun."""
        return bool(self._attempts(trial))

    def latest_attempt(self, trial: Planned) -> str | None:
        """Return the name of the folder of the latest attempt at a trial; None when there is none."""
        numbers = self._attempts(trial)
        return _name(trial, max(numbers)) if numbers else None

    def next_attempt(self, trial: Planned) -> str:
        """Return the name of a folder for one more attempt. The folders of earlier attempts stay. A job that saved a
        checkpoint goes on in its own folder."""
        last = max(self._attempts(trial), default=0)
        return _name(trial, last if self._goes_on(trial, last) else last + 1)

    def has_measured(self, trial: Planned) -> bool:
        """Return whether the trial was measured, or is a job that was cut off and goes on from a checkpoint."""
        attempt = self.attempt(trial)
        return (attempt is not None and attempt.done) or self._goes_on(trial, max(self._attempts(trial), default=0))

    def _goes_on(self, trial: Planned, last: int) -> bool:
        return last > 0 and TrialFolder(self.path / _name(trial, last)).can_go_on

    def attempt(self, trial: Planned) -> Attempt | None:
        """Return how the latest attempt that is over ended; None when there is none that can be read."""
        return self.attempts([trial])[0]

    def attempts(self, trials: Sequence[Planned]) -> list[Attempt | None]:
        """Return what `attempt` does for each of these trials, after one look at the folder."""
        there = self._there()
        latest = (
            (self.over(_name(trial, number)) for number in sorted(there.get(_name(trial), ()), reverse=True))
            for trial in trials
        )
        return [next((attempt for attempt in found if attempt is not None), None) for found in latest]

    def damaged(self, trials: Sequence[Planned]) -> list[str]:
        """Return a line for each damaged attempt that seems to be over. Such attempts do not count."""
        found = []
        for trial in trials:
            for number in self._attempts(trial):
                try:
                    TrialFolder(self.path / _name(trial, number)).outline()
                except Damaged as damaged:
                    found.append(f"{damaged}; this attempt does not count")
        return found

    def _attempts(self, trial: Planned) -> list[int]:
        """Return the numbers, from 1, of the attempts whose folders exist. A file of such a name takes its number
        too."""
        return self._there().get(_name(trial), [])

    def _there(self) -> dict[str, list[int]]:
        """Return the numbers of all attempts that are here, by the name of the trial's first one."""
        found: dict[str, list[int]] = {}
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                first, _, number = path.name.partition("-")
                if path.name == first or number.isdecimal():
                    found.setdefault(first, []).append(int(number or 1))
        return found

    def over(self, name: str) -> Attempt | None:
        """Return how the attempt in the folder `name` ended; None while it is not over, or when it cannot be read."""
        stamps = _stamp(self.path / name / RECORD), _stamp(self.path / name / SUMMARY)
        return None if None in stamps else _attempt_in(self.path / name, stamps)

    def end(self, outcome: Outcome, attempts: list[Attempt | None]) -> None:
        """Complete the record above the trials.

        An outcome that no trial has any more is counted as 0, because a store keeps the last figure that it was given.

        Raises: OSError.
        """
        plan = self.read()
        plan.record.outcome = plan.record.tags["outcome"] = outcome.value
        plan.record.ended_ms = round(time.time() * 1e3)
        counts = Counter(attempt.outcome for attempt in attempts if attempt is not None)
        plan.record.metrics = {"sweep/trials": float(len(attempts))}
        kinds = (kind.value for kind in Outcome if kind is not Outcome.refused)
        plan.record.metrics |= {f"sweep/{kind}": float(counts[kind]) for kind in kinds}
        self.write(plan)

    def end_for_dead(self) -> bool:
        """Record a sweep whose process is gone as killed. Return whether it was not recorded so before.

        Raises: OSError."""
        plan = self.read()
        if plan.record.outcome != RUNNING:
            return False
        plan.record.outcome = plan.record.tags["outcome"] = Outcome.killed.value
        self.write(plan)
        return True

    def check_delivery_note(self) -> None:
        """Raise Damaged when there is a note of what the store was given, and it cannot be read."""
        whole(_Delivered, self.path / DELIVERED)

    @property
    def delivered_as_it_is(self) -> bool:
        """Return whether the store has the present record."""
        record = self.read().record
        with contextlib.suppress(Damaged):  # it is delivered once more, and noted again
            found = whole(_Delivered, self.path / DELIVERED)
            return found is not None and (found.outcome, found.ended_ms) == (record.outcome, record.ended_ms)
        return False

    def mark_delivered(self, run_id: str, record: Record) -> None:
        """Note the store's id of the run and what the store was given."""
        try:
            told = {"run_id": run_id, "outcome": record.outcome, "ended_ms": record.ended_ms}
            write_json(self.path / DELIVERED, told)
        except OSError:
            return

    def artifacts(self) -> list[Path]:
        """Return what goes into the store besides the trials' own records."""
        return [path for path in (self.path / PLAN, self.path / "trials.csv") if path.is_file()]


def _name(trial: Planned, attempt: int = 1) -> str:
    return f"{trial.number:04d}" + (f"-{attempt}" if attempt > 1 else "")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes whenever a file is written again; None where there is none."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_ino, seen.st_mtime_ns, seen.st_size


@functools.lru_cache(maxsize=10_000)
def _attempt_in(folder: Path, _stamps: object) -> Attempt | None:
    """Return how the attempt in a folder ended; None when that cannot be read. A sweep asks for all of its trials
    whenever one has ended.

    Args:
        _stamps: of the files that it is read from."""
    found = _outline(TrialFolder(folder))
    if found is None:
        return None
    names = ("outcome", "reason", "seconds", "metrics", "warnings")
    absent = {f"absent.{name}": why for name, why in found["absent"].items()}
    return Attempt(**{name: found[name] for name in names}, tags=found["tags"] | absent)


def _outline(trial: TrialFolder) -> dict[str, Any] | None:
    with contextlib.suppress(Damaged):
        return trial.outline()
    return None


def outlines(root: Path) -> list[dict[str, Any]]:
    """Return what the newest trials below `root` were and how long they took, for a forecast.

    Trials that cannot be read are left out."""
    newest = sorted(folders(root), reverse=True)[:200]
    found = []
    for folder in newest:
        for trial in (folder, *folder.glob("[0-9]*")):
            outline = _outline(TrialFolder(trial))
            if outline is not None:
                found.append(outline)
    return found
