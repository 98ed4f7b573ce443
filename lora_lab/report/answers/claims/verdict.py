"""Verdicts on claims, with their evidence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_lab.report.statistics.estimates import Estimate
from lora_lab.store.trials import Group, Place, Trial

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
CONFOUNDED = "confounded in the original"
NOT_TESTABLE = "not testable here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One piece of evidence about a claim."""

    text: str
    """In words, with the card and the regime; figures with units and intervals."""
    place: str
    regime: str
    """ "" where it makes no difference (memory)."""
    trials: tuple[str, ...]
    """Run ids."""
    estimate: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A verdict on a claim."""

    claim: str
    """Its id."""
    says: str
    verdict: str
    """One of the four words."""
    why: str
    original: str
    """Remarks on the original's evidence: which factors changed together, true by definition, ..."""
    seen: tuple[Evidence, ...]
    at: str
    """Where that was seen, in few words: "host-bound only", "batch_size=1"; "" where it was everywhere."""
    settle: str
    """What would settle it on the original's card: a command."""
    limited_to: str = ""
    """What the verdict holds for, where that is less than the claim: "for another configuration"."""

    @property
    def words(self) -> str:
        """Return the verdict with what it holds for: "supported for another configuration"."""
        return f"{self.verdict} {self.limited_to}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Evidence of one environment and regime about a claim."""

    seen: tuple[Evidence, ...]
    speaks: bool
    """Whether it may support or contradict."""
    word: str | None
    """SUPPORTED or CONTRADICTED; None where it is undecided."""


def place_names(groups: Sequence[Group]) -> dict[Place, str]:
    """Return display names of environments: the card's name, and the start of its UUID if several share it."""
    units: dict[str, set[str]] = {}
    for group in groups:
        units.setdefault(group.place.device, set()).add(group.place.unit)
    return {group.place: _name(group.place, len(units[group.place.device]) > 1) for group in groups}


def _name(place: Place, told_apart: bool) -> str:
    return f"{place.device} ({'-'.join(place.unit.split('-')[:2])})" if told_apart else place.device


def has_settings(trial: Trial, settings: Mapping[str, str], but: str = "") -> bool:
    """Return whether the trial ran with these settings, leaving `but` open."""
    return all(trial.params.get(key) == value for key, value in settings.items() if key != but)


def ids(trials: Iterable[Trial]) -> tuple[str, ...]:
    """Return their run ids, each once."""
    return tuple(dict.fromkeys(trial.run_id for trial in trials))


def listed(names: Sequence[str]) -> str:
    """Return names in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
