"""A paper's runs and claims, as study_file.py reads them. Another paper is another yaml under studies/."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_lab.report.measures import Measure

SAME_CARD = "same_card"
"""Only trials on the study's card, in its regime, can support or contradict the claim: speed and energy there."""
ANY_CARD = "any_card"
"""Any card's trials can: memory needs, and what is stated of cards in general."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One of the study's own runs."""

    name: str
    settings: Mapping[str, str]
    figures: Mapping[str, tuple[float, float]]
    """Lowest and highest, in the measure's unit, by measure name."""
    printed: Mapping[str, str]
    """Other figures, as the study prints them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A claimed effect on a measure: a change by a ratio, or in a direction."""

    measure: Measure
    sign: int
    """1 where it is claimed to rise, -1 where to fall."""
    ratio: float | None
    """The claimed size; None where only the direction is claimed."""
    least_ratio: float | None
    """The effect nearest to 1 that still counts as the claim; where the file names none, half the claimed one (of its
    logarithm)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A statement of a study, which trials are evidence for it, and what would settle it."""

    id: str
    says: str
    evidence: str
    """SAME_CARD or ANY_CARD."""
    remark: str
    """A remark on the original's evidence beyond what follows from its runs."""
    settle: str
    """Command line that would settle it on the original's card."""
    runs: tuple[str, ...]
    """Names of the runs that the study draws it from."""

    @property
    def ends(self) -> tuple[str, str] | None:
        """Return start and end of the comparison, as names of runs; None where it is not about two runs."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastClaim(Claim):
    """One factor's level over another changes measures. Its runs: the one with `of`, then the one with `over`."""

    factor: str
    of: str
    over: str
    changes: tuple[Change, ...]

    @property
    def ends(self) -> tuple[str, str]:
        """Return the run with `over`, then the run with `of`."""
        return self.runs[1], self.runs[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitsClaim(Claim):
    """Settings fit into a budget."""

    settings: Mapping[str, str]
    budget_gib: float
    told_by: tuple[str, ...]
    """Other settings on which it depends; the evidence lists them separately."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssociationClaim(Claim):
    """Over points, more of one measure goes with less of another."""

    more: Measure
    less: Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A paper: its card, its runs and its claims."""

    id: str
    title: str
    address: str
    card: str
    """The card's name, as the driver gives it."""
    memory_gib: float
    regime: str
    regime_because: str
    held: Mapping[str, str]
    """Settings of all its runs: only trials with these can be evidence."""
    runs: tuple[Run, ...]
    claims: tuple[Claim, ...]

    @property
    def on(self) -> str:
        """Return its card, and why it is assumed to be in its regime."""
        return f"{self.card}, {self.memory_gib:g} GiB; taken to be {self.regime}: {self.regime_because}"

    def run(self, name: str) -> Run:
        """Return one of its runs."""
        return next(run for run in self.runs if run.name == name)

    def settings(self, name: str) -> dict[str, str]:
        """Return all known settings of a run."""
        return {**self.held, **self.run(name).settings}
