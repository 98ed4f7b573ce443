"""Read a study from its yaml file. The schema below says which keys there are."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lora_lab.composition.yaml_file import as_schema, read_yaml
from lora_lab.config import InvalidInput
from lora_lab.report.answers.claims.study import (
    ANY_CARD,
    SAME_CARD,
    AssociationClaim,
    Change,
    Claim,
    ContrastClaim,
    FitsClaim,
    Run,
    Study,
)
from lora_lab.report.measures import MEASURES, Measure

SHIPPED = Path(__file__).parent / "studies"
"""Folder of the studies that come with the package."""

_REQUIRED: Any = "???"
"""OmegaConf's mark of a key that the file must have."""


@dataclass
class _CardKeys:
    name: str = _REQUIRED
    """As the driver gives it."""
    memory_gib: float = _REQUIRED
    regime: str = _REQUIRED
    because: str = _REQUIRED
    """Why that regime is assumed."""


@dataclass
class _RunKeys:
    settings: dict[str, str] = _REQUIRED
    figures: dict[str, Any] = field(default_factory=dict)
    """By measure: a number, or its lowest and highest."""
    printed: dict[str, str] = field(default_factory=dict)
    """Figures that only serve as text."""


@dataclass
class _StudyKeys:
    id: str = _REQUIRED
    title: str = _REQUIRED
    address: str = _REQUIRED
    card: _CardKeys = field(default_factory=_CardKeys)
    settings: dict[str, str] = _REQUIRED
    """Shared by all its runs."""
    runs: dict[str, _RunKeys] = _REQUIRED
    claims: dict[str, Any] = _REQUIRED
    """Each of a kind (contrast, fits, association), with that kind's keys."""


@dataclass
class _ClaimKeys:
    kind: str = _REQUIRED
    says: str = _REQUIRED
    evidence: str = _REQUIRED
    settle: str = _REQUIRED
    remark: str = ""
    runs: list[str] = field(default_factory=list)


@dataclass
class _ChangeKeys:
    measure: str = _REQUIRED
    ratio: float | None = None
    least_ratio: float | None = None
    direction: str | None = None


@dataclass
class _ContrastKeys(_ClaimKeys):
    factor: str = _REQUIRED
    of: str = _REQUIRED
    over: str = _REQUIRED
    changes: list[_ChangeKeys] = _REQUIRED


@dataclass
class _FitsKeys(_ClaimKeys):
    settings: dict[str, str] = _REQUIRED
    budget_gib: float = _REQUIRED
    told_by: list[str] = field(default_factory=list)


@dataclass
class _AssociationKeys(_ClaimKeys):
    more: str = _REQUIRED
    less: str = _REQUIRED


_KINDS: dict[str, type[_ClaimKeys]] = {"contrast": _ContrastKeys, "fits": _FitsKeys, "association": _AssociationKeys}


def shipped() -> list[Study]:
    """Read the studies that come with the package."""
    return [load_study(path) for path in sorted(SHIPPED.glob("*.yaml"))]


def load_study(path: Path) -> Study:
    """Read a study from its yaml file.

    Raises: InvalidInput that names what is wrong in the file, and where."""
    keys = as_schema(_StudyKeys, read_yaml(path, "the yaml with a paper's claims"), path)
    file = _File(path)
    runs = tuple(file.run(name, run) for name, run in keys.runs.items())
    if not runs or not keys.claims:
        file.refuse("claims" if runs else "runs", "it is empty")
    return Study(
        id=keys.id,
        title=keys.title,
        address=keys.address,
        card=keys.card.name,
        memory_gib=file.positive("card.memory_gib", keys.card.memory_gib),
        regime=keys.card.regime,
        regime_because=keys.card.because.strip(),
        held=keys.settings,
        runs=runs,
        claims=tuple(file.claim(name, claim, runs) for name, claim in keys.claims.items()),
    )


class _File:
    """A study's file, so that every message can name it; checks what a schema cannot say."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def refuse(self, key: str, why: str) -> NoReturn:
        raise InvalidInput(f"{self._path}: {key}: {why}.")

    def run(self, name: str, keys: _RunKeys) -> Run:
        at = f"runs.{name}.figures"
        figures = {
            self.measure(f"{at}.{key}", key).name: self.spread(f"{at}.{key}", v) for key, v in keys.figures.items()
        }
        return Run(name=name, settings=keys.settings, figures=figures, printed=keys.printed)

    def claim(self, name: str, data: Any, runs: tuple[Run, ...]) -> Claim:
        at = f"claims.{name}"
        kind = data.get("kind") if isinstance(data, dict) else None
        if kind not in _KINDS:
            self.refuse(f"{at}.kind", f"{kind!r} is not known; there is {', '.join(_KINDS)}")
        keys = as_schema(_KINDS[kind], data, self._path, at)
        if keys.evidence not in (SAME_CARD, ANY_CARD):
            self.refuse(f"{at}.evidence", f"{keys.evidence!r} is not known; there is {SAME_CARD}, {ANY_CARD}")
        for each in keys.runs:
            if each not in {run.name for run in runs}:
                self.refuse(f"{at}.runs", f"unknown run {each!r}; the runs are {', '.join(r.name for r in runs)}")
        common: dict[str, Any] = {
            "id": name,
            "says": keys.says.strip(),
            "evidence": keys.evidence,
            "remark": " ".join(keys.remark.split()),
            "settle": " ".join(keys.settle.split()),
            "runs": tuple(keys.runs),
        }
        if isinstance(keys, _ContrastKeys):
            self.check_ends(at, keys, runs)
            changes = tuple(self.change(f"{at}.changes[{n}]", change) for n, change in enumerate(keys.changes))
            return ContrastClaim(**common, factor=keys.factor, of=keys.of, over=keys.over, changes=changes)
        if isinstance(keys, _FitsKeys):
            budget = self.positive(f"{at}.budget_gib", keys.budget_gib)
            return FitsClaim(**common, settings=keys.settings, budget_gib=budget, told_by=tuple(keys.told_by))
        assert isinstance(keys, _AssociationKeys)
        more, less = self.measure(f"{at}.more", keys.more), self.measure(f"{at}.less", keys.less)
        if more is less or not (more.ratios and less.ratios):
            self.refuse(f"{at}.less", "an association is between two different measures that are compared by ratios")
        return AssociationClaim(**common, more=more, less=less)

    def check_ends(self, at: str, keys: _ContrastKeys, runs: tuple[Run, ...]) -> None:
        if len(keys.runs) != 2:
            self.refuse(f"{at}.runs", "a contrast needs two runs: the one with `of`, then the one with `over`")
        for name, level in zip(keys.runs, (keys.of, keys.over), strict=True):
            found = next(run for run in runs if run.name == name).settings.get(keys.factor)
            if found != level:
                self.refuse(f"{at}.runs", f"run {name} has {keys.factor}={found}, and the claim is about {level}")
        if not keys.changes:
            self.refuse(f"{at}.changes", "name at least one measure that is claimed to change")

    def change(self, at: str, keys: _ChangeKeys) -> Change:
        measure = self.measure(f"{at}.measure", keys.measure)
        if (keys.ratio is None) == (keys.direction is None):
            self.refuse(f"{at}.ratio", "give either ratio, or direction: higher or lower")
        if keys.ratio is None:
            if keys.direction not in ("higher", "lower"):
                self.refuse(f"{at}.direction", f"{keys.direction!r} is not known; there is higher, lower")
            return Change(measure=measure, sign=1 if keys.direction == "higher" else -1, ratio=None, least_ratio=None)
        ratio = self.positive(f"{at}.ratio", keys.ratio)
        least = math.sqrt(ratio) if keys.least_ratio is None else self.positive(f"{at}.least_ratio", keys.least_ratio)
        if ratio == 1 or not 0 < math.log(least) / math.log(ratio) <= 1:
            self.refuse(f"{at}.least_ratio", f"it lies between 1 and ratio={ratio:g}, which is not 1; it is {least:g}")
        if not measure.ratios:
            self.refuse(f"{at}.ratio", f"{measure.name} is compared by differences; give direction")
        return Change(measure=measure, sign=1 if ratio > 1 else -1, ratio=ratio, least_ratio=least)

    def measure(self, key: str, name: str) -> Measure:
        found = next((measure for measure in MEASURES if measure.name == name), None)
        if found is None:
            self.refuse(key, f"unknown measure {name!r}; there is {', '.join(each.name for each in MEASURES)}")
        return found

    def spread(self, key: str, value: Any) -> tuple[float, float]:
        """Return a figure's lowest and highest."""
        ends = [self.positive(key, end) for end in (value if isinstance(value, list) else [value, value])]
        if len(ends) != 2 or ends[0] > ends[1]:
            self.refuse(key, f"it has to be a number, or [lowest, highest]; it is {value!r}")
        return ends[0], ends[1]

    def positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.refuse(key, f"it has to be a number above 0; it is {value!r}")
        return float(value)
