"""What a paper claims, put to the trials at hand.

Only trials with the settings that all of the study's runs share are looked at, each place and regime for itself.

Who can speak: for a claim with `evidence: same_card` only trials on the study's card (its name as the driver gives it)
in the study's regime; for `any_card` all of them. What others show is listed and decides nothing.

What decides, with 95 % intervals and ratios on the log scale:

- a contrast by a ratio is supported where the interval lies wholly on the claimed side of no effect and reaches
  `least_ratio` (an interval beyond the claimed ratio supports it too); contradicted where the whole interval falls
  short of `least_ratio`, and either holds an effect (not 0) or the experiment would have seen the claimed ratio four
  times in five; undecided else. The effect is the average over the settings at hand, each counting the same;
- a contrast in a direction: supported where the interval is wholly on that side, contradicted where wholly on the
  other. Of several changes all have to be supported, and one contradicted contradicts the claim;
- fits: lora_lab/report/claims_memory.py;
- an association: the slope of log(less) on log(more) over points (medians of their trials): supported where its
  interval is below 0, contradicted where above. -1 is what a constant product makes, as energy a token = power /
  throughput does; between -1 and 0 the product (the power) grows with the first measure.

Where places or regimes that may speak disagree, a claim about any card is contradicted (one counterexample is enough),
and one about a single card stays undecided. What is undecided is "confounded in the original" where by rank the study's
own runs cannot tell the claim's factor from others, else "not testable here".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from lora_lab.report.claims.memory import judge_fits
from lora_lab.report.claims.needed import Needed, needed
from lora_lab.report.claims.study import (
    ANY_CARD,
    AssociationClaim,
    Change,
    Claim,
    ContrastClaim,
    FitsClaim,
    Study,
    load_study,
    shipped,
)
from lora_lab.report.claims.verdict import CONFOUNDED, CONTRADICTED, NOT_TESTABLE, SUPPORTED, Seen, Verdict
from lora_lab.report.effects.blocks import figures, regime_of, settings_besides
from lora_lab.report.effects.contrasts import Contrast, contrasts
from lora_lab.report.effects.estimates import Estimate, estimate
from lora_lab.report.factors import Factor, design, tied
from lora_lab.report.front import points
from lora_lab.report.measures import ENERGY, THROUGHPUT
from lora_lab.report.trials import Group, Trial
from lora_lab.report.words import change, told

__all__ = [
    "CONFOUNDED",
    "CONTRADICTED",
    "NOT_TESTABLE",
    "SUPPORTED",
    "Needed",
    "Seen",
    "Study",
    "Verdict",
    "judge",
    "load_study",
    "needed",
    "shipped",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one place's trials of one regime show of a claim."""

    seen: tuple[Seen, ...]
    speaks: bool
    """Whether it may support or contradict."""
    word: str | None
    """SUPPORTED or CONTRADICTED; None where it is undecided."""


def judge(study: Study, groups: Sequence[Group]) -> list[Verdict]:
    """Every claim of the study."""
    ours = [narrowed for group in groups if (narrowed := narrow(group, study.held)).trials]
    return [_judge(study, claim, ours) for claim in study.claims]


def narrow(group: Group, settings: Mapping[str, str]) -> Group:
    """The group with only those trials that have these settings."""

    def has(trial: Trial) -> bool:
        return all(trial.params.get(key) == value for key, value in settings.items())

    return Group(
        place=group.place,
        trials=tuple(trial for trial in group.trials if has(trial)),
        measured=tuple(trial for trial in group.measured if has(trial)),
        excluded=tuple(each for each in group.excluded if has(each.trial)),
    )


def _judge(study: Study, claim: Claim, groups: Sequence[Group]) -> Verdict:
    if isinstance(claim, FitsClaim):
        return judge_fits(study, claim, groups)
    found = [each for group in groups for each in _look(study, claim, group)]
    speaking = [each for each in found if each.speaks]
    words = {each.word for each in speaking if each.word is not None}
    if len(words) == 1 or (words and claim.evidence == ANY_CARD):
        word = CONTRADICTED if CONTRADICTED in words else SUPPORTED
        meaning = [_meaning(claim)] if isinstance(claim, AssociationClaim) else []
        why = " ".join([_because(each for each in speaking if each.word == word), *meaning, *_besides(speaking, word)])
    else:
        word, why = _undecided(study, claim, speaking)
    return Verdict(
        claim=claim.id,
        says=claim.says,
        verdict=word,
        why=why,
        original=_original(study, claim),
        seen=tuple(seen for each in found for seen in each.seen),
        settle=claim.settle,
    )


def _because(found: Iterable[_Found]) -> str:
    return " ".join(seen.text for each in found for seen in each.seen)


def _besides(speaking: Sequence[_Found], word: str) -> list[str]:
    """Where else it was looked at, with another result or none."""
    said = []
    for others, how in (({None}, "Undecided"), ({SUPPORTED, CONTRADICTED} - {word}, "Otherwise")):
        places = [f"{seen.regime} on {seen.place}" for each in speaking if each.word in others for seen in each.seen]
        if places:
            said.append(f"{how}: {', '.join(dict.fromkeys(places))}.")
    return said


def _undecided(study: Study, claim: Claim, speaking: Sequence[_Found]) -> tuple[str, str]:
    """The verdict where no trials decide, and why."""
    words = {each.word for each in speaking} - {None}
    where = "" if claim.evidence == ANY_CARD else f" {study.regime} on {study.card}"
    if not speaking:
        lack = f"No trial at hand tests it{where}"
        lack += "; what others show is listed, and can neither support nor contradict it." if where else "."
    else:
        lack = f"The trials{where} {'disagree' if words else 'decide nothing'}: {_because(speaking)}"
    others = _tied_with(study, claim)
    if not others:
        return NOT_TESTABLE, lack
    return CONFOUNDED, f"By rank, its own runs cannot tell {_factor(claim)} from {_listed(others)}. {lack}"


def _factor(claim: Claim) -> str:
    return claim.factor if isinstance(claim, ContrastClaim) else ""


def _tied_with(study: Study, claim: Claim) -> list[str]:
    """What the study's own runs cannot tell the claim's factor from."""
    groups = tied([study.settings(run.name) for run in study.runs])
    return [name for group in groups if _factor(claim) in group for name in group if name != _factor(claim)]


def _original(study: Study, claim: Claim) -> str:
    said = []
    if isinstance(claim, ContrastClaim):
        said.append(_changed(study, claim))
    if isinstance(claim, AssociationClaim):
        said.append(_product(study, claim))
    return " ".join(text for text in [*said, claim.remark] if text)


def _changed(study: Study, claim: ContrastClaim) -> str:
    start, end = (study.settings(run) for run in claim.ends)
    keys = [key for key in dict.fromkeys([*start, *end]) if start.get(key) != end.get(key)]
    moves = [f"{key} ({start.get(key, 'not stated')} to {end.get(key, 'not stated')})" for key in keys]
    between = f"between its runs {claim.ends[0]} and {claim.ends[1]}"
    if keys == [claim.factor]:
        return f"Nothing but {moves[0]} changed {between}."
    return f"{len(keys)} settings changed at once {between}: {_listed(moves)}."


def _product(study: Study, claim: AssociationClaim) -> str:
    """Whether the product of both measures is one number in all of the study's runs."""
    both = [
        (run.figures[claim.more.name], run.figures[claim.less.name]) for run in study.runs if _has(run.figures, claim)
    ]
    products = [[more[end] * less[end] for more, less in both] for end in (0, 1)]
    if len(both) < 2 or any(max(each) > 1.05 * min(each) for each in products):
        return ""
    low, high = (sum(each) / len(each) for each in products)
    ends = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    return (
        f"In all of its {len(both)} runs {claim.more.title} x {claim.less.title} is {ends} within 5 %: one follows "
        "from the other."
    )


def _has(told_figures: Mapping[str, object], claim: AssociationClaim) -> bool:
    return claim.more.name in told_figures and claim.less.name in told_figures


def _look(study: Study, claim: Claim, group: Group) -> list[_Found]:
    if isinstance(claim, ContrastClaim):
        return _contrasts(study, claim, group)
    return _associations(study, claim, group) if isinstance(claim, AssociationClaim) else []


def _speaks(study: Study, claim: Claim, group: Group, regime: str) -> bool:
    return claim.evidence == ANY_CARD or (group.place.device == study.card and regime == study.regime)


# One factor's level over another


def _contrasts(study: Study, claim: ContrastClaim, group: Group) -> list[_Found]:
    sides = [trial for trial in group.measured if trial.params.get(claim.factor) in (claim.of, claim.over)]
    if len({trial.params[claim.factor] for trial in sides}) < 2:
        return []
    factors = design(sides, baseline={claim.factor: claim.over}).factors
    factor = next(each for each in factors if claim.factor in each.keys)
    if factor.name != claim.factor:
        text = f"On {group.place.device} {claim.factor} cannot be told from the rest of {factor.name} in these trials."
        seen = Seen(text=text, place=group.place.label, regime=regime_of(sides), trials=_ids(sides))
        return [_Found(seen=(seen,), speaks=False, word=None)]
    by_regime: dict[str, list[tuple[Change, Contrast]]] = {}
    for each in claim.changes:
        for contrast in contrasts(sides, factors, each.measure):
            if contrast.factor == factor.name and contrast.of == claim.of:
                by_regime.setdefault(contrast.regime, []).append((each, contrast))
    return [_of_regime(study, claim, group, regime, made, sides, factors) for regime, made in by_regime.items()]


def _of_regime(
    study: Study,
    claim: ContrastClaim,
    group: Group,
    regime: str,
    made: Sequence[tuple[Change, Contrast]],
    sides: Sequence[Trial],
    factors: Sequence[Factor],
) -> _Found:
    words = [decide(each, contrast.estimate) for each, contrast in made]
    whole = len(made) == len(claim.changes)
    return _Found(
        seen=tuple(
            Seen(
                text=f"On {group.place.device}, {regime}: {_contrast_text(study, claim, each, contrast)}",
                place=group.place.label,
                regime=regime,
                trials=_paired(sides, factors, claim, contrast),
                estimate=contrast.estimate,
            )
            for each, contrast in made
        ),
        speaks=_speaks(study, claim, group, regime),
        word=CONTRADICTED if CONTRADICTED in words else SUPPORTED if whole and set(words) == {SUPPORTED} else None,
    )


def decide(claimed: Change, found: Estimate) -> str | None:
    """SUPPORTED, CONTRADICTED, or None where the interval decides nothing (the module says when)."""
    if found.low is None or found.high is None:
        return None
    low, high = sorted((claimed.sign * found.low, claimed.sign * found.high))
    if claimed.ratio is None or claimed.least_ratio is None:
        return SUPPORTED if low > 0 else CONTRADICTED if high < 0 else None
    least, size = abs(math.log(claimed.least_ratio)), abs(math.log(claimed.ratio))
    if low > 0 and high >= least:
        return SUPPORTED
    would_see = found.detectable is not None and found.detectable < size
    return CONTRADICTED if high < least and (found.seen or would_see) else None


def _contrast_text(study: Study, claim: ContrastClaim, claimed: Change, contrast: Contrast) -> str:
    measure, found = contrast.measure, contrast.estimate
    pairs = "1 pair of trials" if contrast.pairs == 1 else f"{contrast.pairs} pairs of trials"
    cells = "1 setting" if contrast.cells == 1 else f"{contrast.cells} settings"
    text = f"{measure.title} with {claim.of} over {claim.over}, {pairs} in {cells} of the rest: {told(found, measure)}"
    size = _size(study, claim, claimed)
    if size is not None and found.detectable is not None:
        whose = "claimed" if claimed.ratio is not None else "original's"
        could = "would have been seen" if found.detectable < abs(size) else "could have been missed"
        text += f"; the {whose} {change(size, measure)} {could}"
    if contrast.also_changed:
        text += f"; besides, what ran differed in {_listed(contrast.also_changed)}"
    return text + "."


def _size(study: Study, claim: ContrastClaim, claimed: Change) -> float | None:
    """The effect that trials should have been able to see, as a log ratio: the claimed one, else that between the
    middles of the study's own figures. None for what is not compared by ratios, or has no figures."""
    if claimed.ratio is not None:
        return math.log(claimed.ratio)
    name = claimed.measure.name
    runs = [study.run(run).figures for run in claim.ends]
    if not claimed.measure.ratios or any(name not in told_figures for told_figures in runs):
        return None
    over, of = (sum(told_figures[name]) for told_figures in runs)
    return math.log(of / over)


def _paired(
    sides: Sequence[Trial], factors: Sequence[Factor], claim: ContrastClaim, contrast: Contrast
) -> tuple[str, ...]:
    """Run ids of the trials that the contrast is made of: of one setting of everything else, and of both levels."""
    found = [figure.trial for figure in figures(sides, contrast.measure)]
    own = [factor for factor in factors if factor.name == contrast.factor]
    cells: dict[tuple[str, ...], list[Trial]] = {}
    for trial, setting in zip(found, settings_besides(found, own), strict=True):
        cells.setdefault(setting, []).append(trial)
    both = [cell for cell in cells.values() if len({trial.params[claim.factor] for trial in cell}) == 2]
    return _ids(trial for cell in both if regime_of(cell) == contrast.regime for trial in cell)


# More of one measure, less of another


def _associations(study: Study, claim: AssociationClaim, group: Group) -> list[_Found]:
    if not group.measured:
        return []
    found = points(group.measured, group.measured, design(group.measured).factors)
    whole = [point for point in found if claim.more.name in point.figures and claim.less.name in point.figures]
    made = []
    for regime in dict.fromkeys(point.regime for point in whole):
        inside = [point for point in whole if point.regime == regime]
        more = [math.log(point.figures[claim.more.name][0]) for point in inside]
        less = [math.log(point.figures[claim.less.name][0]) for point in inside]
        if len(inside) < 4 or len(set(more)) < 3:
            continue
        line = stats.linregress(more, less)
        slope = estimate(float(line.slope), float(line.stderr), len(inside) - 2)
        seen = Seen(
            text=f"On {group.place.device}, {regime}: {_association_text(claim, slope, more, less)}",
            place=group.place.label,
            regime=regime,
            trials=_ids(trial for point in inside for trial in point.trials),
            estimate=slope,
        )
        word = SUPPORTED if (slope.high or 0) < 0 else CONTRADICTED if (slope.low or 0) > 0 else None
        made.append(_Found(seen=(seen,), speaks=_speaks(study, claim, group, regime), word=word))
    return made


def _association_text(claim: AssociationClaim, slope: Estimate, more: Sequence[float], less: Sequence[float]) -> str:
    rank = (
        "no rank correlation" if len(set(less)) < 2 else f"Spearman's rho {stats.spearmanr(more, less).statistic:.2f}"
    )
    return (
        f"over {len(more)} points ({math.exp(max(more) - min(more)):.3g}-fold in {claim.more.title}) "
        f"{claim.less.title} goes as {claim.more.title} with the exponent {slope.value:.2f} "
        f"(95 %: {slope.low:.2f} to {slope.high:.2f}), {rank}."
    )


def _meaning(claim: AssociationClaim) -> str:
    """What the slope tells."""
    product = "the power drawn" if (claim.more, claim.less) == (THROUGHPUT, ENERGY) else "their product"
    return f"An exponent of -1 means that {product} is the same everywhere, nearer to 0 that it grows with the first."


def _ids(trials: Iterable[Trial]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(trial.run_id for trial in trials))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
