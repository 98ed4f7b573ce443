"""Test whether what a study says fits into a budget does fit.

Trials with the claim's settings are put together by point (all else equal; without the emulated capacity), and
lora_lab.report.answers.fits says of each point whether it fits: the same judgement as in the report's table of budgets.
Trials whose batches were not full are passed over: shorter rows need less, and are no evidence about full ones.

Supported if any point fits, "for another configuration" where that is none of the study's own runs; contradicted if
none does, not with less slack for torch's allocator either, and a run of the study's own is among those tried: other
settings that need more are not evidence.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_lab.outcome import Outcome
from lora_lab.report.answers.claims.study import ANY_CARD, FitsClaim, Study
from lora_lab.report.answers.claims.verdict import (
    CONTRADICTED,
    NOT_TESTABLE,
    SUPPORTED,
    Evidence,
    Verdict,
    has_settings,
    ids,
    place_names,
)
from lora_lab.report.answers.fits import LIMIT, fits
from lora_lab.report.measures import VRAM
from lora_lab.report.statistics.blocks import settings_besides
from lora_lab.report.statistics.factors import Factor, tokens_a_step
from lora_lab.report.writing.labels import count
from lora_lab.store.trials import Group, Trial

_FULL = 0.98
"""Share of the slots that batch size and sequence length allow: from here on a trial's batches count as full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """One trial with the claim's settings."""

    trial: Trial
    place: str
    name: str
    """Display name of the environment."""
    fits: bool | None
    """Whether its point fits; None if the trial, or its point, is not evidence."""
    may_fit: bool = False
    """Whether it is above the budget only by what torch's allocator kept without using it."""


def judge_fits(study: Study, claim: FitsClaim, groups: Sequence[Group]) -> Verdict:
    """Judge one claim by trials with the settings that all of the study's runs share."""
    places = [group for group in groups if claim.evidence == ANY_CARD or group.place.device == study.card]
    names = place_names(places)
    tried = [each for group in places for each in _tried(claim, group, names[group.place])]
    word, why = _word(study, claim, tried)
    if word != NOT_TESTABLE:
        why = " ".join([why, *_own_runs(study, claim, tried), _assumed(claim, tried)])
    printed = [
        f"Its run {name} printed {key} {value}."
        for name in claim.runs
        for key, value in study.run(name).printed.items()
    ]
    return Verdict(
        claim=claim.id,
        says=claim.says,
        verdict=word,
        why=why,
        original=" ".join([*printed, claim.remark]).strip(),
        seen=tuple(_seen(claim, same, tried) for same in _alike(claim, tried)),
        at="; ".join(_ways(claim, tried)),
        settle=claim.settle,
        limited_to=_limited_to(study, claim, tried) if word == SUPPORTED else "",
    )


def _limited_to(study: Study, claim: FitsClaim, tried: Sequence[_Tried]) -> str:
    """Return what the support is limited to where none of the study's own runs is known to fit."""
    own = [each for each in tried if any(has_settings(each.trial, study.settings(name)) for name in claim.runs)]
    return "" if not claim.runs or any(each.fits for each in own) else "for another configuration"


def _tried(claim: FitsClaim, group: Group, name: str) -> list[_Tried]:
    ran = [trial for trial in group.trials if trial.finished or trial.outcome == Outcome.out_of_memory.value]
    trials = [trial for trial in ran if has_settings(trial, claim.settings)]
    points: dict[tuple[str, ...], list[Trial]] = {}
    limit = Factor(name=LIMIT, keys=(LIMIT,), levels=())
    for trial, setting in zip(trials, settings_besides(trials, [limit]), strict=True):
        points.setdefault(setting, []).append(trial)
    said = []
    for same in points.values():
        telling = [trial for trial in same if not trial.finished or _full(trial)]
        found = fits(telling, (), [claim.budget_gib])
        it_fits = found[0].largest is not None if found else None
        may_fit = bool(found and found[0].next_may_fit)
        said += [(trial, it_fits if trial in telling else None, may_fit) for trial in same]
    return [_Tried(trial=t, place=group.place.label, name=name, fits=does, may_fit=may) for t, does, may in said]


def _full(trial: Trial) -> bool:
    """Return whether its batches were full (padding included): batch size x sequence length."""
    slots, steps = (trial.metrics.get(f"throughput/{name}_per_second") for name in ("slots", "steps"))
    if slots is None or not steps:
        return trial.params.get("data.batching") in ("seq_len", "packed")
    return slots / steps >= _FULL * tokens_a_step(trial.params)


def _word(study: Study, claim: FitsClaim, tried: Sequence[_Tried]) -> tuple[str, str]:
    what = _settings(claim.settings)
    fitting = [each for each in tried if each.fits]
    short = [each for each in tried if each.fits is False]
    if fitting:
        return SUPPORTED, f"{_lead(study, claim, tried)} {_how_near(claim, fitting)}"
    own = [each for each in short if any(has_settings(each.trial, study.settings(name)) for name in claim.runs)]
    slack = any(each.may_fit for each in short)
    if own and not slack:
        took = _took(short)
        return CONTRADICTED, f"Everything tried with {what} needed more than {claim.budget_gib:g} GiB ({took})."
    if short:
        took = _took(short)
        why = f"What was tried with {what} took more than {claim.budget_gib:g} GiB ({took}), but"
        if not own:
            return NOT_TESTABLE, f"{why} none of them was a run of the original."
        return (
            NOT_TESTABLE,
            f"{why} some of that was torch's cache: run capacity={claim.budget_gib:g}gib to see whether it fits.",
        )
    lack = f"No available trial with {what} shows whether it fits into {claim.budget_gib:g} GiB"
    return NOT_TESTABLE, lack + (": none had full batches on a suitable card or capacity." if tried else ".")


def _lead(study: Study, claim: FitsClaim, tried: Sequence[_Tried]) -> str:
    """Return the settings at which it fits, and whether the study's own runs do: "at batch_size=1 with
    raise_to_fp32=False; ..."."""
    ways = _ways(claim, tried)
    said = [f"at {'; or at '.join(ways)}"] if ways else ["in all that was tried"]
    for name in claim.runs:
        same = [each for each in tried if has_settings(each.trial, study.settings(name))]
        run = f"the original's own run {name} ({_short(study.settings(name))})"
        if not same:
            said.append(f"{run} was not tried here")
        elif not any(each.fits for each in same):
            short = any(each.fits is False for each in same)
            said.append(f"{run} {'did not fit as tried here' if short else 'is not known to fit'}")
        else:
            said.append(f"{run} fits too")
    return "; ".join(said) + "."


def _ways(claim: FitsClaim, tried: Sequence[_Tried]) -> list[str]:
    """Return other settings at which it fits, if they were varied."""
    varied = [_varied(claim, each, tried) for each in tried if each.fits]
    return list(dict.fromkeys(_at(each) for each in varied if each))


def _at(settings: Mapping[str, str]) -> str:
    return " with ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in settings.items())


def _short(settings: Mapping[str, str]) -> str:
    return "x".join(settings[key] for key in ("batch_size", "seq_len") if key in settings)


def _how_near(claim: FitsClaim, fitting: Sequence[_Tried]) -> str:
    """Return the figures, and what an emulated limit leaves out."""
    emulated = [each.trial for each in fitting if each.trial.params.get(LIMIT, "None") != "None"]
    took = _took(fitting)
    said = f"{took[0].upper()}{took[1:]}."
    rose = [
        peak - trial.metrics.get("card/used_before_gib", 0.0)
        for trial in emulated
        if (peak := VRAM.of(trial)) is not None
    ]
    if rose:
        spare = claim.budget_gib - max(rose)
        said += (
            f" Without memory in use before the trial: {max(rose):.2f} of {claim.budget_gib:g} GiB, "
            f"{spare:.2f} GiB to spare."
        )
    if emulated:
        said += (
            f" An emulated limit is not what a real card of {claim.budget_gib:g} GiB leaves free: a display and other "
            "programs use part of it, and so does the CUDA context."
        )
    return said


def _own_runs(study: Study, claim: FitsClaim, tried: Sequence[_Tried]) -> list[str]:
    """Return the memory that the claim's own runs needed here."""
    said = []
    for name in claim.runs:
        same = [each for each in tried if has_settings(each.trial, study.settings(name))]
        for told, word in (([t for t in same if t.fits], "fits"), ([t for t in same if t.fits is False], "too large")):
            if told:
                said.append(f"Run {name}, {word}: {_took(told)}.")
    return said


def _assumed(claim: FitsClaim, tried: Sequence[_Tried]) -> str:
    """Return what all of the evidence assumes."""
    same = {
        key: value for key, value in _of(claim, tried[0]).items() if all(_of(claim, t)[key] == value for t in tried)
    }
    full = "every batch full, each row seq_len tokens long or padded to it"
    return f"Assumed in all of these trials: {', '.join([*(f'{key}={value}' for key, value in same.items()), full])}."


def _alike(claim: FitsClaim, tried: Sequence[_Tried]) -> list[list[_Tried]]:
    """Group trials by environment and the claim's settings, the fitting ones first."""
    found: dict[tuple[str, ...], list[_Tried]] = {}
    for each in tried:
        found.setdefault((each.place, *_of(claim, each).values()), []).append(each)
    return sorted(found.values(), key=lambda same: (not any(t.fits for t in same), tokens_a_step(same[0].trial.params)))


def _of(claim: FitsClaim, each: _Tried) -> dict[str, str]:
    return {key: each.trial.params.get(key, "not recorded") for key in claim.told_by}


def _varied(claim: FitsClaim, each: _Tried, tried: Sequence[_Tried]) -> dict[str, str]:
    return {key: value for key, value in _of(claim, each).items() if any(_of(claim, t)[key] != value for t in tried)}


def _seen(claim: FitsClaim, same: Sequence[_Tried], tried: Sequence[_Tried]) -> Evidence:
    settings = _settings({**claim.settings, **_varied(claim, same[0], tried)})
    fitting = [each for each in same if each.fits]
    short = [each for each in same if each.fits is False]
    silent = [each for each in same if each.fits is None]
    said = [f"fits into {claim.budget_gib:g} GiB ({_took(fitting)})"] if fitting else []
    said += [f"needs more{' at other points' if fitting else ''} ({_took(short)})"] if short else []
    said += [f"{count(len(silent), 'trial')} not usable (batches not full, or other capacities)"] if silent else []
    return Evidence(
        text=f"{same[0].name}, {settings}: {'; '.join(said)}.",
        place=same[0].place,
        regime="",
        trials=ids(each.trial for each in same),
    )


def _took(tried: Sequence[_Tried]) -> str:
    """Return memory use, as in "peak of 8.8 to 8.9 GiB on the whole card in 12 trials; out of memory within an emulated
    8 GiB in 1"."""
    said = []
    for limit, trials in _by_limit(each.trial for each in tried if each.trial.finished).items():
        peaks = [gib for trial in trials if (gib := VRAM.of(trial)) is not None]
        before = [trial.metrics["card/used_before_gib"] for trial in trials if "card/used_before_gib" in trial.metrics]
        took = f"peak of {_range(peaks)} GiB{_before(before)}" if peaks else "finished"
        said.append(f"{took} {limit} in {count(len(trials), 'trial')}")
    for limit, trials in _by_limit(each.trial for each in tried if not each.trial.finished).items():
        asked = [trial.metrics.get("out_of_memory/asked_gib") for trial in trials]
        known = [gib for gib in asked if gib is not None]
        more = f", asking for {_range(known)} GiB more" if known else ""
        said.append(f"out of memory {limit} in {count(len(trials), 'trial')}{more}")
    return "; ".join(said)


def _before(gib: Sequence[float]) -> str:
    return f", {_range(gib)} GiB of it held before the trial," if gib and max(gib) >= 0.01 else ""


def _by_limit(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """Group trials by how much memory they were given."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        limit = trial.params.get(LIMIT, "None")
        memory = trial.tags.get("device.memory_gib")
        whole = f"on the whole card of {float(memory):g} GiB" if memory else "on the whole card"
        found.setdefault(whole if limit == "None" else f"within an emulated {float(limit):g} GiB", []).append(trial)
    return found


def _range(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return low if low == high else f"{low} to {high}"


def _settings(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
