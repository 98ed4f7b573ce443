"""Trials that may be compared: one kind, one model, one data set, one window length, one environment."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.config import InvalidInput
from lora_lab.report.statistics.factors import NO_EFFECT
from lora_lab.report.statistics.kinds import Kind, groups_alike, kind_of, kind_of_group
from lora_lab.report.writing.labels import count, outcome_text
from lora_lab.store.trials import Group, Place, Trial

_WINDOW = ("measure.warmup_steps", "measure.steps", "measure.eval_rows")
_JOB = ("measure.eval_rows",)
"""Of the settings of measurement, what jobs have in common: their length is a choice of the user's, and may differ."""
_LAYOUT = ("data.batching",)
"""Of the settings under data, what is a way to train and not another data set."""
_SHOWN = 6
_ID = 12
"""Characters of an id that make it unique in practice."""

_Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Trials that answer one question."""

    place: Place
    kind: Kind
    key: _Key
    """Settings of model, data and window."""
    trials: tuple[Trial, ...]
    """Trials with an informative outcome, by their start."""
    measured: tuple[Trial, ...]

    @property
    def text(self) -> str:
        """Return a description of the cohort."""
        told = dict(self.key)
        weights = told.get("model.weights")
        model = told.get("model", "a model") + (f" ({weights} weights)" if weights else "")
        return f"{model} on {told.get('data', 'its data')}, {self.place.label}"

    @property
    def model(self) -> str:
        """Return the option of the model."""
        return dict(self.key).get("model", "not recorded")

    @property
    def newest_ms(self) -> int:
        """Return when its newest measured trial began (Unix time)."""
        return max(trial.started_ms for trial in self.measured)


def subjects(
    trials: Sequence[Trial], model: str | None = None, card: str | None = None, kind: Kind | None = None
) -> list[Subject]:
    """Return measured trials grouped by what may be compared. The first is to be used: that of the newest
    trial of that kind, in the environment with most measurements of it. The rest are ordered by their newest trial.

    Raises: InvalidInput when there is none."""
    chosen = [trial for trial in trials if _is_model(trial, model) and _is_card(trial, card)]
    if trials and not chosen:
        raise InvalidInput(_none_such(trials, model, card))
    found = [subject for group in groups_alike(chosen) for subject in _subjects(group)]
    if not found:
        raise InvalidInput(_nothing_measured(chosen))
    of_kind = [subject for subject in found if kind in (None, subject.kind)]
    if not of_kind:
        raise InvalidInput(_other_kind(found))
    newest = max(of_kind, key=lambda subject: subject.newest_ms)
    told = (newest.kind, newest.key, newest.place.device)
    alike = [one for one in of_kind if (one.kind, one.key, one.place.device) == told]
    first = max(alike, key=lambda subject: (len(subject.measured), subject.newest_ms))
    rest = [subject for subject in found if subject is not first]
    return [first, *sorted(rest, key=lambda subject: -subject.newest_ms)]


def others(found: Sequence[Subject]) -> list[str]:
    """Return one line per cohort other than the first, with the option that selects it."""
    first, *rest = found
    lines = [_other(first, subject) for subject in rest[:_SHOWN]]
    if len(rest) > _SHOWN:
        lines.append(f"and {len(rest) - _SHOWN} more: --model, --card and --sweep choose")
    return lines


def _subjects(group: Group) -> list[Subject]:
    keys: dict[_Key, tuple[list[Trial], list[Trial]]] = {}
    for trial in group.trials:
        keys.setdefault(_key(trial), ([], []))[0].append(trial)
    for trial in group.measured:
        keys[_key(trial)][1].append(trial)
    return [
        Subject(place=group.place, kind=kind_of_group(group), key=key, trials=tuple(told), measured=tuple(measured))
        for key, (told, measured) in keys.items()
        if measured
    ]


def _key(trial: Trial) -> _Key:
    kind = kind_of(trial)
    return tuple(sorted((key, value) for key, value in trial.params.items() if _tells(key, kind)))


@functools.cache
def _tells(key: str, kind: Kind) -> bool:
    """Return whether trials that differ in this setting answer different questions."""
    measured = _WINDOW if kind is Kind.window else _JOB
    return (key.partition(".")[0] in ("model", "data") or key in measured) and key not in (*_LAYOUT, *NO_EFFECT)


def _is_model(trial: Trial, model: str | None) -> bool:
    names = [trial.params.get(key, "").lower() for key in ("model", "model.id", "model.path")]
    return model is None or model.lower() in names


def _is_card(trial: Trial, card: str | None) -> bool:
    place = trial.place
    return card is None or card.lower() in place.device.lower() or place.unit.lower().startswith(card.lower())


def _none_such(trials: Sequence[Trial], model: str | None, card: str | None) -> str:
    asked = " and ".join(text for text in (model and f"--model {model}", card and f"--card {card}") if text)
    models = ", ".join(sorted({trial.params.get("model", "not recorded") for trial in trials}))
    cards = ", ".join(sorted({trial.place.device for trial in trials}))
    return f"no trial matches {asked}. There are trials of the models {models}, on {cards}."


def _other_kind(found: Sequence[Subject]) -> str:
    there = found[0].kind
    number = count(sum(len(subject.measured) for subject in found), there.value)
    asked = {
        Kind.job: "no window, as --kind window asks for",
        Kind.window: "no job, as --kind job, --hours and the objectives hours and kwh ask for",
    }
    return f"of this model and card {number} can be used, but {asked[there]}. Leave that out, or run some."


def _nothing_measured(trials: Sequence[Trial]) -> str:
    kinds = sorted({outcome_text(trial.outcome) for trial in trials if not trial.finished})
    invalid = any(trial.finished for trial in trials)
    ended = ", ".join(kinds + ["finished, but invalid"] * invalid)
    there = f"{count(len(trials), 'trial')} ended without a usable figure ({ended})" if trials else "no trial"
    return f"no measurement yet: {there}. Run some: python -m lora_lab -m sweep=paper_factorial"


def _other(first: Subject, other: Subject) -> str:
    """Return one line: how many trials, what differs, what to type."""
    here, there = dict(first.key), dict(other.key)
    keys = [
        key
        for key in sorted(here | there)
        if here.get(key) != there.get(key) and _tells(key, other.kind) and _tells(key, first.kind)
    ]
    short = [key for key in keys if "." not in key] or keys
    apart = [f"{key}={there.get(key, 'absent')}" for key in short[:3]]
    if other.place.device != first.place.device:
        apart.append(other.place.device)
    elif other.place.unit != first.place.unit:
        apart.append(f"another card or host with the same name, {other.place.unit}")
    if (other.place.versions, other.place.code, other.place.dirty) != (
        first.place.versions,
        first.place.code,
        first.place.dirty,
    ):
        apart.append("other versions or code")
    number = count(len(other.measured), "trial" if other.kind is first.kind else other.kind.value)
    return f"{number}{' of ' if apart else ''}{', '.join(apart)}: {_option(first, other)}"


def _option(first: Subject, other: Subject) -> str:
    """Return the option that selects it: a sweep's or trial's id if neither kind, model nor card does."""
    here, there = dict(first.key), dict(other.key)
    if first.kind is not other.kind:
        model = f" --model {there['model']}" if "model" in there and here.get("model") != there["model"] else ""
        return f"--kind {other.kind.value}{model}"
    if here.get("model") != there.get("model") and "model" in there:
        return f"--model {there['model']}"
    if first.place.unit != other.place.unit and " and " not in other.place.unit:
        return f"--card {other.place.unit}"
    ids = dict.fromkeys(trial.sweep or trial.run_id for trial in reversed(other.measured))
    return " ".join(f"--sweep {name[:_ID]}" for name in list(ids)[:2]) + (" ..." if len(ids) > 2 else "")
