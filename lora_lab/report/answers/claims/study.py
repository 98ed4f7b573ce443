"""A paper's runs and claims, read from a yaml file: another paper is another yaml under studies/.

The file has `id`, `title`, `address`; `card` (`name` as the driver gives it, `memory_gib`, `regime` and `because`, why
that regime is taken for granted); `settings` that all its runs share; `runs` by name, each with `settings`, `figures`
(by measure, a number or its lowest and highest) and `printed` (figures that only serve as text); `claims` by name,
each of a kind (`contrast`, `fits`, `association`) with what the kind needs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lora_lab.config import InvalidInput
from lora_lab.report.measures import MEASURES, Measure

SHIPPED = Path(__file__).parent / "studies"
"""Folder of the studies that come with the package."""

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
    """What a measure is claimed to do: change by a ratio, or in a direction."""

    measure: Measure
    sign: int
    """1 where it is claimed to rise, -1 where to fall."""
    ratio: float | None
    """The claimed size; None where only the direction is claimed."""
    least_ratio: float | None
    """The effect nearest to 1 that still is what was claimed; where the file names none, half the claimed one (of its
    logarithm)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a study says, for whom, and what would settle it."""

    id: str
    says: str
    evidence: str
    """SAME_CARD or ANY_CARD."""
    remark: str
    """What is to be said of the original's evidence beyond what follows from its runs."""
    settle: str
    """Command line that would settle it on the original's card."""
    runs: tuple[str, ...]
    """Names of the runs that the study draws it from."""

    @property
    def ends(self) -> tuple[str, str] | None:
        """Start and end of the comparison, as names of runs; None where it is not about two runs."""
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
        """The run with `over`, then the run with `of`."""
        return self.runs[1], self.runs[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitsClaim(Claim):
    """Settings fit into a budget."""

    settings: Mapping[str, str]
    budget_gib: float
    told_by: tuple[str, ...]
    """Other settings on which it depends, told apart in the evidence."""


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
    """Settings of all its runs: only trials with these say anything about it."""
    runs: tuple[Run, ...]
    claims: tuple[Claim, ...]

    @property
    def on(self) -> str:
        """Its card, and why it is taken to be in its regime."""
        return f"{self.card}, {self.memory_gib:g} GiB; taken to be {self.regime}: {self.regime_because}"

    def run(self, name: str) -> Run:
        """One of its runs."""
        return next(run for run in self.runs if run.name == name)

    def settings(self, name: str) -> dict[str, str]:
        """Everything that is known of how a run was set."""
        return {**self.held, **self.run(name).settings}


def shipped() -> list[Study]:
    """The studies that come with the package."""
    return [load_study(path) for path in sorted(SHIPPED.glob("*.yaml"))]


def load_study(path: Path) -> Study:
    """A study from its yaml file.

    Raises: InvalidInput naming what is wrong in the file, and where."""
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidInput(f"there is no file {path}. Name the yaml with a paper's claims.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"{path} cannot be read as yaml: {error}") from error
    top = _Section(told, path, "")
    top.only("id", "title", "address", "card", "settings", "runs", "claims")
    card = top.section("card")
    card.only("name", "memory_gib", "regime", "because")
    runs = tuple(_run(name, run) for name, run in top.sections("runs"))
    return Study(
        id=top.text("id"),
        title=top.text("title"),
        address=top.text("address"),
        card=card.text("name"),
        memory_gib=card.positive("memory_gib"),
        regime=card.text("regime"),
        regime_because=card.text("because"),
        held=top.settings("settings"),
        runs=runs,
        claims=tuple(_claim(name, claim, runs) for name, claim in top.sections("claims")),
    )


def _run(name: str, told: "_Section") -> Run:
    told.only("settings", "figures", "printed")
    figures = told.section("figures", optional=True)
    return Run(
        name=name,
        settings=told.settings("settings"),
        figures={figures.measure_name(key): figures.spread(key) for key in figures.told},
        printed={key: str(value) for key, value in told.section("printed", optional=True).told.items()},
    )


_COMMON = ("kind", "says", "evidence", "remark", "settle", "runs")


def _claim(name: str, told: "_Section", runs: tuple[Run, ...]) -> Claim:
    kind = told.one_of("kind", ["contrast", "fits", "association"])
    drawn_from = told.names("runs")
    for each in drawn_from:
        if each not in {run.name for run in runs}:
            told.refuse("runs", f"there is no run {each!r}; the runs are {', '.join(run.name for run in runs)}")
    common = {
        "id": name,
        "says": told.text("says"),
        "evidence": told.one_of("evidence", [SAME_CARD, ANY_CARD]),
        "remark": " ".join(told.text("remark", "").split()),
        "settle": " ".join(told.text("settle").split()),
        "runs": tuple(drawn_from),
    }
    if kind == "contrast":
        return _contrast(told, common, runs)
    return _fits(told, common) if kind == "fits" else _association(told, common)


def _contrast(told: "_Section", common: dict[str, Any], runs: tuple[Run, ...]) -> ContrastClaim:
    told.only(*_COMMON, "factor", "of", "over", "changes")
    factor, levels = told.text("factor"), (told.text("of"), told.text("over"))
    if len(common["runs"]) != 2:
        told.refuse("runs", "a contrast is drawn from two runs: the one with `of`, then the one with `over`")
    for name, level in zip(common["runs"], levels, strict=True):
        found = next(run for run in runs if run.name == name).settings.get(factor)
        if found != level:
            told.refuse("runs", f"run {name} has {factor}={found}, and the claim is about {level}")
    changes = told.items("changes")
    if not changes:
        told.refuse("changes", "name at least one measure that is claimed to change")
    made = tuple(_change(change) for change in changes)
    return ContrastClaim(**common, factor=factor, of=levels[0], over=levels[1], changes=made)


def _change(told: "_Section") -> Change:
    told.only("measure", "ratio", "least_ratio", "direction")
    measure = told.measure("measure")
    if ("ratio" in told.told) == ("direction" in told.told):
        told.refuse("ratio", "give either ratio, or direction: higher or lower")
    if "direction" in told.told:
        sign = 1 if told.one_of("direction", ["higher", "lower"]) == "higher" else -1
        return Change(measure=measure, sign=sign, ratio=None, least_ratio=None)
    ratio = told.positive("ratio")
    least = told.positive("least_ratio") if "least_ratio" in told.told else math.sqrt(ratio)
    if ratio == 1 or not 0 < math.log(least) / math.log(ratio) <= 1:
        told.refuse("least_ratio", f"it lies between 1 and ratio={ratio:g}, which is not 1; {least:g} was given")
    if not measure.ratios:
        told.refuse("ratio", f"{measure.name} is compared by differences; give direction")
    return Change(measure=measure, sign=1 if ratio > 1 else -1, ratio=ratio, least_ratio=least)


def _fits(told: "_Section", common: dict[str, Any]) -> FitsClaim:
    told.only(*_COMMON, "settings", "budget_gib", "told_by")
    return FitsClaim(
        **common,
        settings=told.settings("settings"),
        budget_gib=told.positive("budget_gib"),
        told_by=tuple(told.names("told_by")),
    )


def _association(told: "_Section", common: dict[str, Any]) -> AssociationClaim:
    told.only(*_COMMON, "more", "less")
    more, less = told.measure("more"), told.measure("less")
    if more is less or not (more.ratios and less.ratios):
        told.refuse("less", "an association is between two different measures that are compared by ratios")
    return AssociationClaim(**common, more=more, less=less)


class _Section:
    """A mapping of the file, with where it stands, so that every refusal can name the key."""

    def __init__(self, told: Any, path: Path, at: str) -> None:
        self._path, self._at = path, at
        if not isinstance(told, dict):
            raise InvalidInput(f"{path}: {at or 'the file'} has to be a mapping (key: value); it is {told!r}.")
        self.told: dict[str, Any] = {str(key): value for key, value in told.items()}

    def refuse(self, key: str, why: str) -> NoReturn:
        where = f"{self._at}.{key}" if self._at else key
        raise InvalidInput(f"{self._path}: {where}: {why}.")

    def only(self, *keys: str) -> None:
        for key in self.told:
            if key not in keys:
                self.refuse(key, f"there is no such key here; the keys are {', '.join(keys)}")

    def section(self, key: str, optional: bool = False) -> "_Section":
        if key not in self.told and not optional:
            self.refuse(key, "it is missing")
        return _Section(self.told.get(key, {}), self._path, f"{self._at}.{key}" if self._at else key)

    def sections(self, key: str) -> list[tuple[str, "_Section"]]:
        inside = self.section(key)
        if not inside.told:
            self.refuse(key, "it is empty")
        return [(name, inside.section(name)) for name in inside.told]

    def items(self, key: str) -> list["_Section"]:
        told = self.told.get(key)
        if not isinstance(told, list):
            self.refuse(key, f"it has to be a list; it is {told!r}")
        return [_Section(item, self._path, f"{self._at}.{key}[{n}]") for n, item in enumerate(told)]

    def text(self, key: str, default: str | None = None) -> str:
        value = self.told.get(key, default)
        if value is None or isinstance(value, dict | list):
            self.refuse(key, "it is missing" if value is None else f"it has to be text; it is {value!r}")
        return str(value).strip()

    def names(self, key: str) -> list[str]:
        told = self.told.get(key, [])
        if not isinstance(told, list):
            self.refuse(key, f"it has to be a list; it is {told!r}")
        return [str(name) for name in told]

    def one_of(self, key: str, known: list[str]) -> str:
        value = self.text(key)
        if value not in known:
            self.refuse(key, f"{value!r} is not known; there is {', '.join(known)}")
        return value

    def settings(self, key: str) -> dict[str, str]:
        return {name: str(value) for name, value in self.section(key).told.items()}

    def positive(self, key: str) -> float:
        return self._number(key, self.told.get(key))

    def spread(self, key: str) -> tuple[float, float]:
        """A figure as its lowest and highest."""
        told = self.told[key]
        ends = [self._number(key, end) for end in (told if isinstance(told, list) else [told, told])]
        if len(ends) != 2 or ends[0] > ends[1]:
            self.refuse(key, f"it has to be a number, or [lowest, highest]; it is {told!r}")
        return ends[0], ends[1]

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            self.refuse(key, f"it has to be a number above 0; it is {value!r}")
        return float(value)

    def measure(self, key: str) -> Measure:
        name = self.one_of(key, [measure.name for measure in MEASURES])
        return next(measure for measure in MEASURES if measure.name == name)

    def measure_name(self, key: str) -> str:
        if key not in {measure.name for measure in MEASURES}:
            self.refuse(key, f"no such measure; there is {', '.join(measure.name for measure in MEASURES)}")
        return key
