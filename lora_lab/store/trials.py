"""Trials and sweeps as a store returns them, and which of them may be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_lab.outcome import Outcome

_AND = " and "
"""Between the cards of a place that has several."""

_VERSIONS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place where trials ran. Figures of different places are never averaged."""

    device: str
    """The card's name, or the CPU's."""
    unit: str
    """The card's UUID, or the host's name; of a sweep side by side those of all its cards, joined by " and "."""
    host: str
    """CPU and its cores: they decide how fast host-bound trials are."""
    versions: str
    code: str
    """Digest of this package's code."""
    dirty: bool
    """Whether the code had changes that no commit has."""

    @property
    def label(self) -> str:
        """Return the name of the place for the user."""
        units = self.unit.split(_AND)
        which = f"{self.device} ({self.unit[:12]})" if len(units) == 1 else f"{len(units)} x {self.device}"
        return which + (", uncommitted code" if self.dirty else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The run above a sweep's trials."""

    run_id: str
    name: str
    outcome: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    started_ms: int

    @property
    def axes(self) -> dict[str, list[str]]:
        """Return what varied, as asked for: each key with its values in order."""
        told = {key.removeprefix("axis."): text for key, text in self.params.items() if key.startswith("axis.")}
        return {key: text.split(",") for key, text in told.items()}

    @property
    def planned(self) -> int | None:
        """Return how many trials were planned, all repeats of skipped points among them; None when that is not
        recorded."""
        told = self.params.get("trials", "")
        return int(told) if told.isdecimal() else None

    @property
    def repeats(self) -> int:
        """Return how often each point was planned."""
        told = self.params.get("repeats", "")
        return int(told) if told.isdecimal() else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial, read back from a store."""

    run_id: str
    name: str
    sweep: str | None
    """Run id of the sweep above it."""
    outcome: str
    params: Mapping[str, str]
    """The chosen option of each group under its plain name, and every setting under its dotted key."""
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    started_ms: int

    @property
    def repeat(self) -> int:
        """Return the number of its repeat, from 0."""
        return int(self.params.get("repeat", "0"))

    @property
    def finished(self) -> bool:
        """Return whether it ran to its end."""
        return self.outcome == Outcome.finished.value

    @property
    def is_member(self) -> bool:
        """Return whether it trained together with other trials. Then its losses alone are its own."""
        return self.params.get("cotrain", "[]") != "[]"

    @property
    def regime(self) -> str:
        """Return host-bound, GPU-bound or mixed; "not known" when it could not be observed, for example on a CPU."""
        return self.tags.get("regime", "not known")

    @property
    def card(self) -> str | None:
        """Return the UUID of its card, or those of several; None on a CPU."""
        return self.tags.get("device.uuid")

    @property
    def place(self) -> Place:
        """Return where it ran."""
        tags = self.tags
        versions = [f"{name} {tags[f'version.{name}']}" for name in _VERSIONS if f"version.{name}" in tags]
        cores = tags.get("machine.cpu_count", "?")
        cores = f"{tags['device.cores']} of {cores}" if "device.cores" in tags else cores
        driver = [f"driver {tags['device.driver']}"] if "device.driver" in tags else []
        return Place(
            device=tags.get("device.cpu") or tags.get("device", "device not recorded"),
            unit=tags.get("device.uuid") or tags.get("process.host", "host not recorded"),
            host=f"{tags.get('machine.cpu', 'CPU not recorded')}, {cores} cores",
            versions=", ".join(versions + driver),
            code=tags.get("code", "not recorded"),
            dirty=tags.get("dirty") == "true",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """A trial whose figures are not used, and why."""

    trial: Trial
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The trials of one place. The cards of a sweep with placement=each_gpu or on a cluster, which are alike, are one
    place."""

    place: Place
    trials: tuple[Trial, ...]
    """Every trial that says something about its point (finished, out of memory, diverged, ...), sorted by start."""
    measured: tuple[Trial, ...]
    """The trials whose figures may be compared: finished, and not invalid."""
    excluded: tuple[Excluded, ...]

    @property
    def doubtful(self) -> tuple[Trial, ...]:
        """Return the measured trials that something may have disturbed. They are used, and named."""
        return tuple(trial for trial in self.measured if trial.tags.get("validity") == "doubtful")


def groups(trials: Sequence[Trial]) -> list[Group]:
    """Return trials by place, the place with most measured trials first."""
    found: dict[Place, list[Trial]] = {}
    units = _units(trials)
    for trial in sorted(trials, key=lambda trial: trial.started_ms):
        place = trial.place
        together = units.get((trial.sweep, replace(place, unit="")), ())
        found.setdefault(replace(place, unit=_AND.join(sorted(together))) if together else place, []).append(trial)
    made = [_group(place, told) for place, told in found.items()]
    return sorted(made, key=lambda group: -len(group.measured))


def _units(trials: Sequence[Trial]) -> dict[tuple[str | None, Place], set[str]]:
    """Return the cards of each sweep whose trials ran side by side or on a cluster, by all else that makes a place."""
    beside = {
        trial.sweep
        for trial in trials
        if trial.sweep is not None and trial.card and trial.tags.keys() & {"slot", "cluster"}
    }
    found: dict[tuple[str | None, Place], set[str]] = {}
    for trial in trials:
        if trial.sweep in beside and trial.card:
            found.setdefault((trial.sweep, replace(trial.place, unit="")), set()).add(trial.card)
    return found


_SAYS_NOTHING = tuple(
    outcome.value
    for outcome in (
        Outcome.killed,
        Outcome.failed,
        Outcome.timed_out,
        Outcome.refused,
        Outcome.predicted_out_of_memory,  # an estimate is no evidence of what fits
    )
)
"""Outcomes of trials that measured nothing about their point: resume runs these again."""


def _group(place: Place, trials: Sequence[Trial]) -> Group:
    kept, measured, excluded = [], [], []
    for trial in trials:
        reason = trial.tags.get("reason", "")
        if trial.outcome in _SAYS_NOTHING or not _over(trial):
            why = trial.outcome + (f": {reason}" if reason else "")
            again = any(other is not trial and _same(other, trial) and other.finished for other in trials)
            excluded.append(Excluded(trial=trial, why=why + ("; run again since" if again else "")))
            continue
        kept.append(trial)
        if trial.finished and trial.tags.get("validity") == "invalid":
            why = trial.tags.get("validity_reasons", "no reason kept")
            excluded.append(Excluded(trial=trial, why=f"invalid: {why}"))
        elif trial.finished:
            measured.append(trial)
    return Group(place=place, trials=tuple(kept), measured=tuple(measured), excluded=tuple(excluded))


def _over(trial: Trial) -> bool:
    return trial.outcome in {outcome.value for outcome in Outcome}


def _same(one: Trial, other: Trial) -> bool:
    """Return whether both are attempts at the same trial."""
    mark = one.tags.get("fingerprint")
    return mark is not None and mark == other.tags.get("fingerprint") and one.sweep == other.sweep
